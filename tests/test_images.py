"""Every odd image a person may bring: it works with a note, or it is refused with one sentence."""

import contextlib
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dymu.errors import BadImage
from dymu.media.images import MAX_PIXELS, LoadedImage, in_folder, load

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def photo() -> Image.Image:
    rows, columns = np.mgrid[0:48, 0:64]
    return Image.fromarray(np.stack([rows * 5, columns * 3, rows + columns], -1).astype(np.uint8))


def refusal(source) -> str:
    with pytest.raises(BadImage) as caught:
        load(source)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def rgb_png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """A PNG written by hand, for what Pillow itself does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def test_an_ordinary_image_comes_through_unchanged_and_unremarked(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    loaded = load(tmp_path / "a.png")
    assert loaded.notes == ()
    assert loaded.image.mode == "RGB"
    assert np.array_equal(np.asarray(loaded.image), np.asarray(photo))


def test_a_pillow_image_is_taken_and_left_alone(photo):
    grey = photo.convert("L")
    loaded = load(grey)
    assert grey.mode == "L"
    assert loaded.image.mode == "RGB"
    assert load(photo).image is not photo


def test_missing_empty_folder_and_address(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.png")
    refusal("no\0such.png")
    refusal("x" * 5000)
    assert "is a folder" in refusal(tmp_path)
    assert "download it" in refusal("https://example.org/cat.jpg")
    (tmp_path / "empty.png").touch()
    assert "is empty" in refusal(tmp_path / "empty.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "no ordinary file" in refusal(tmp_path / "pipe.png")


def test_text_named_jpg(tmp_path):
    (tmp_path / "a.jpg").write_text("This is not a photo.\n" * 20)
    assert "is not an image" in refusal(tmp_path / "a.jpg")


def test_formats_that_start_other_programs_are_not_read(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    assert "is not an image" in refusal(tmp_path / "a.eps")


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp"])
def test_a_truncated_image(photo, tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    photo.resize((256, 256)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in refusal(path)


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3)])
def test_too_small(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    assert "too small" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000)])
def test_too_long(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    sentence = refusal(tmp_path / "a.png")
    assert f"{size[0]:,} × {size[1]:,}" in sentence
    assert "crop it" in sentence


@pytest.mark.parametrize("size", [(4, 4), (400, 4), (4, 400)])
def test_the_smallest_and_the_longest_that_are_taken(size):
    assert load(Image.new("RGB", size)).image.size == size


@pytest.mark.parametrize("side", [11_000, 60_000])
def test_a_decompression_bomb_is_refused_unopened(tmp_path, side):
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(rgb_png(side, side, 8, rows=b"\0"))
    assert "million pixels" in refusal(tmp_path / "bomb.png")


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    loaded = load(tmp_path / "a.jpg")
    assert np.abs(np.asarray(loaded.image).astype(int) - RED).max() < 8
    assert "CMYK" in loaded.notes[0]


def test_a_palette_with_transparency_lies_on_white(tmp_path):
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([*RED, *BLUE])
    palette.paste(1, (0, 0, 4, 8))
    palette.save(tmp_path / "a.png", transparency=0)
    loaded = load(tmp_path / "a.png")
    assert loaded.image.getpixel((0, 0)) == BLUE
    assert loaded.image.getpixel((7, 7)) == WHITE
    assert "white" in loaded.notes[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_half_transparent_black_on_white_is_grey(mode):
    straight = Image.new("RGBA" if mode.startswith("RGB") else "LA", (8, 8))
    straight.putalpha(128)
    loaded = load(straight.convert(mode))
    assert abs(loaded.image.getpixel((0, 0))[0] - 127) <= 1
    assert "white" in loaded.notes[0]


def test_an_opaque_alpha_channel_is_not_worth_a_note(photo):
    assert load(photo.convert("RGBA")).notes == ()


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, extension):
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"a.{extension}")
    loaded = load(tmp_path / f"a.{extension}")
    assert np.array_equal(np.asarray(loaded.image)[..., 0].ravel(), np.arange(256))
    assert "16 bits" in loaded.notes[0]


def test_16_bit_colour_is_scaled_too(tmp_path):
    row = b"\0" + struct.pack(">3H", 65_535, 32_768, 256) * 8
    (tmp_path / "a.png").write_bytes(rgb_png(8, 8, 16, rows=row * 8))
    assert load(tmp_path / "a.png").image.getpixel((0, 0)) == (255, 128, 1)


def test_integers_and_floats_are_scaled_by_their_range():
    wide = np.linspace(-1e6, 1e6, 64, dtype=np.int32).reshape(8, 8)
    unit = np.linspace(0, 0.5, 64, dtype=np.float32).reshape(8, 8)
    holed = unit.copy()
    holed[0, 0] = np.nan
    assert np.asarray(load(Image.fromarray(wide)).image).max() == 255
    assert np.asarray(load(Image.fromarray(unit)).image).max() == 128
    assert np.asarray(load(Image.fromarray(holed)).image).max() == 128
    assert np.asarray(load(Image.fromarray(np.full((8, 8), 7e9, np.float32))).image).max() == 0


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    loaded = load(tmp_path / "a.gif")
    assert loaded.image.getpixel((3, 3)) == RED
    assert loaded.notes == ("animated GIF: using the first of 3 frames",)


def test_pages_of_a_tiff(tmp_path):
    pages = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert load(tmp_path / "a.tif").notes == ("TIFF of 2 pages: using the first",)


def test_the_second_picture_in_a_phones_jpeg_is_not_used(photo, tmp_path):
    photo.save(tmp_path / "a.mpo", save_all=True, append_images=[photo.rotate(90)])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert load(tmp_path / "a.jpg").notes == ("JPEG holding 2 pictures: using the first",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    loaded = load(tmp_path / "a.png")
    assert np.array_equal(np.asarray(loaded.image), np.asarray(upright))
    assert len(loaded.notes) == (orientation != 1)


def test_what_was_turned_upright_says_nothing_of_it_any_more(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    turned = load(tmp_path / "a.png").image
    assert turned.size == photo.size[::-1]
    assert load(turned) == LoadedImage(turned, ())


def encoded(photo: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    photo.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "rubbish", [b"XX\0*\0\0\0\x08", b"", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\x12" * 40]
)
def test_a_rubbish_exif_block_is_left_out(photo, kind, rubbish):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    plain = load(encoded(photo, kind, **lossless)).image
    odd = encoded(photo, kind, exif=b"Exif\0\0" + rubbish, **lossless)
    for source in (odd, Image.open(io.BytesIO(odd))):
        loaded = load(source)
        assert loaded.image == plain
        assert all("EXIF block cannot be read" in note for note in loaded.notes)
    if kind != "JPEG" and rubbish.startswith(b"XX"):  # Pillow has looked at a JPEG's itself, and gives an empty one
        assert loaded.notes


def test_an_orientation_that_is_no_number_is_none(photo):
    for value in ("6", (6, 6), 6.0, 0, 9, b"6"):
        image = photo.copy()
        image.getexif()[0x0112] = value
        assert load(image).image == photo


BLOCKS = {"PNG": (b"eXIf", b"iCCP", b"zTXt", b"tEXt", b"iTXt", b"pHYs"), "WEBP": (b"EXIF", b"ICCP", b"XMP ")}


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_rubbish_in_any_other_block_is_taken_or_one_sentence(data, photo, recwarn):
    """The pixels are whole: what is taken shows them."""
    kind = data.draw(st.sampled_from(list(BLOCKS)))
    options: dict[str, object] = {"exif": Image.Exif(), "icc_profile": bytes(range(256)), "xmp": b"<x/>" * 9}
    if kind == "PNG":
        texts = PngInfo()
        texts.add_text("a", "b" * 40)
        texts.add_text("c", "d" * 400, zip=True)
        texts.add_itxt("XML:com.adobe.xmp", "<x/>")
        options = {**options, "pnginfo": texts, "dpi": (72, 72)}
    else:
        options["lossless"] = True
    options["exif"][0x010E] = "words"
    broken = bytearray(encoded(photo, kind, **options))
    block = data.draw(st.sampled_from(BLOCKS[kind]))
    at = broken.index(block)
    if kind == "PNG":
        size = int.from_bytes(broken[at - 4 : at])
        broken[at + 4 : at + 4 + size] = data.draw(st.binary(min_size=size, max_size=size))
        broken[at + 4 + size : at + 8 + size] = struct.pack(">I", zlib.crc32(broken[at : at + 4 + size]))
    else:
        size = int.from_bytes(broken[at + 4 : at + 8], "little")
        broken[at + 8 : at + 8 + size] = data.draw(st.binary(min_size=size, max_size=size))
    try:
        loaded = load(bytes(broken))
    except BadImage as error:
        sentence = str(error)
        assert "\n" not in sentence
        return
    assert loaded.image == photo
    assert not recwarn.list


def test_a_pillow_image_whose_file_is_damaged_or_closed_is_one_sentence(photo, tmp_path):
    cut = encoded(photo.resize((256, 256)), "PNG")
    assert "this image is damaged or cut short" in refusal(Image.open(io.BytesIO(cut[: len(cut) // 2])))
    photo.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as closed:
        pass
    refusal(closed)


def test_a_name_that_begins_with_a_tilde(photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("~draft.png", "home/a.png", "x" * 251 + ".png"):
        photo.save(name)
    for name in ("~draft.png", "~/a.png", "x" * 251 + ".png"):
        assert load(name).image == photo
    assert "~nosuch.png does not exist" in refusal("~nosuch.png")
    assert [path.name for path in in_folder("~")[0]] == ["a.png"]


def test_what_a_folder_holds(photo, tmp_path):
    for name in ("b.jfif", "a.JPEG", "c.Png", ".hidden.png"):
        photo.save(tmp_path / name, "JPEG")
    assert [path.name for path in in_folder(tmp_path)[0]] == ["a.JPEG", "b.jfif", "c.Png"]
    assert in_folder(tmp_path)[1] == ""
    for name in ("1.heic", "2.HEIC", "3.txt", "4"):
        (tmp_path / name).touch()
    for name in "abcdefg":
        (tmp_path / name).mkdir()
    assert in_folder(tmp_path)[1] == (
        f"left out of {tmp_path}, as not read here: 2 .heic, 1 .txt, 1 without a suffix, the folders a, b, c, d, e, …"
    )
    photo.save(tmp_path / "a" / "only.dng", "PNG")
    with pytest.raises(
        BadImage, match=r"a holds no images \(left out of .*a, as not read here: 1 \.dng\): name a folder"
    ):
        in_folder(tmp_path / "a")
    with pytest.raises(BadImage, match=r"nosuch cannot be looked into \(No such file or directory\)"):
        in_folder(tmp_path / "nosuch")


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_bytes_never_get_further_than_a_sentence(data, photo, tmp_path):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    broken = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "broken"
    path.write_bytes(broken[: data.draw(st.integers(1, len(broken)))])
    with contextlib.suppress(BadImage):  # anything else that is raised fails the test
        assert load(path).image.mode == "RGB"


class Broken:
    def __array__(self, *_args: object, **_options: object) -> np.ndarray:
        raise RuntimeError("nothing here")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("source", "says"),
    [
        (lambda: torch.empty(3, 8, 8, device="meta"), r"a tensor whose values cannot be read as an array \(Can"),
        (lambda: torch.zeros(3, 8, 8).to_sparse(), r"a tensor whose values cannot be read as an array \("),
        (lambda: torch.quantize_per_tensor(torch.zeros(3, 8, 8), 1, 0, torch.quint8), "a tensor whose values"),
        (Broken, r"a Broken whose values cannot be read as an array \(nothing here\)"),
        (lambda: np.full((8, 8), np.nan), "an array of floats, of which some are NaN"),
    ],
)
def test_numbers_that_cannot_be_read_are_not_called_a_damaged_file(source, says):
    sentence = refusal(source())
    assert re.search(says, sentence)
    assert "copy of it" not in sentence


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_a_closed_image_is_said_to_be(photo, tmp_path, kind):
    photo.save(tmp_path / "a", kind)
    images = [Image.open(tmp_path / "a"), Image.open(tmp_path / "a"), photo.copy()]
    images[1].load()
    for image in images:
        image.close()
        assert "a Pillow image that was closed before it was read" in refusal(image)


def test_small_whole_numbers_stay_what_they_are():
    values = np.arange(0, 256, 4, dtype=np.int32).reshape(8, 8)
    loaded = load(Image.fromarray(values))
    assert np.array_equal(np.asarray(loaded.image)[..., 0], values)
    assert loaded.notes == ("its whole numbers, none above 255, taken as 8 bits",)


@pytest.mark.parametrize("colours", [1, 3])
def test_the_transparent_colour_of_a_16_bit_png_lies_on_white(colours):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    levels = [1000, 2000, 30_000, 60_000]
    row = b"\0" + b"".join(struct.pack(">H", level) * colours for level in levels)
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2 if colours == 3 else 0, 0, 0, 0)
    clear = struct.pack(">H", 2000) * colours
    chunks = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(row * 4)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)
    for source in (data, Image.open(io.BytesIO(data))):
        loaded = load(source)
        assert [loaded.image.getpixel((x, 0))[0] for x in range(4)] == pytest.approx([4, 255, 117, 233], abs=1)
        assert "its transparent parts laid on white" in loaded.notes


def test_an_orientation_in_xmp_is_not_called_exif(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF><r:Description tiff:Orientation="6"/></r:RDF></x:xmpmeta>'
    Image.new("RGB", (40, 20)).save(tmp_path / "a.webp", xmp=xmp)
    loaded = load(tmp_path / "a.webp")
    assert loaded.image.size == (20, 40)
    assert loaded.notes == ("turned upright as its metadata says",)


def test_a_name_too_long_for_the_file_system(tmp_path):
    assert refusal(tmp_path / ("x" * 300 + ".png")).endswith("(File name too long): give it a shorter name.")
