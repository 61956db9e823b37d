"""Every odd video a person may bring: it gives frames with a note, or it is refused with one sentence."""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from dymu.errors import BadVideo, DymuError
from dymu.media import film
from dymu.media.frames import Frames
from dymu.media.images import MAX_PIXELS
from dymu.media.videos import is_film, load, spread

try:
    import av
except ImportError:
    av = None

needs_av = pytest.mark.skipif(av is None, reason="PyAV is not installed")

RED, WHITE = (255, 0, 0), (255, 255, 255)
KINDS = ["mp4", "mkv", "webm", "avi", "ts", "mpg", "flv", "ogv", "wmv"]
CODECS = {"webm": "libvpx-vp9", "avi": "mpeg4", "mpg": "mpeg2video", "ogv": "libvpx", "wmv": "wmv2"}


def step(total: int) -> int:
    """How much brighter each frame of a clip is than the one before."""
    return 200 // max(total - 1, 1)


def picture(index: int, total: int, size=(64, 48)) -> Image.Image:
    return Image.new("RGB", size, (20 + index * step(total),) * 3)


def which(frame: Image.Image, total: int) -> int:
    """The number of a frame that was made by `picture`, by its brightness."""
    return round((float(np.asarray(frame).mean()) - 20) / step(total))


def encode(path: Path, total=40, size=(64, 48), *, pictures=None, rate=10, ticks=None, gop=12, **how) -> Path:
    """A video file of `total` frames, each brighter than the one before."""
    codec = how.get("codec") or CODECS.get(path.suffix[1:], "libx264")
    with av.open(str(path), "w", options=how.get("options", {})) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(gop), "crf": "18"})
        stream.width, stream.height = size
        stream.pix_fmt = how.get("pixels", "yuv420p")
        stream.bit_rate = 2_000_000
        if "aspect" in how:
            stream.codec_context.sample_aspect_ratio = how["aspect"]
        if "turn" in how:
            stream.set_display_rotation(how["turn"])
        for index in range(total):
            frame = av.VideoFrame.from_image(pictures[index] if pictures else picture(index, total, size))
            frame.pts = ticks[index] if ticks else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, path: Path, start: float, *, from_zero: bool = True, from_key: bool = True) -> Path:
    """What `ffmpeg -c copy` cuts: packets from the key frame before `start` on, with a list that hides those before it.

    Args:
        from_zero: whether times are moved, so that `start` is zero.
        from_key: whether the packets before `start` are there.
    """
    with av.open(str(source)) as whole, av.open(str(path), "w") as part:
        (stream,) = whole.streams.video
        copy = part.add_stream_from_template(stream)
        ticks = round(start / stream.time_base)
        if from_key:
            whole.seek(ticks, stream=stream)
        for packet in whole.demux(stream):
            if packet.dts is None or not (from_key or packet.pts >= ticks):
                continue
            if from_zero:
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            packet.stream = copy
            part.mux(packet)
    return path


def sound(path: Path, codec: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44_100, layout="mono")
        layout = "fltp" if codec == "aac" else "s16"
        kind = np.float32 if codec == "aac" else np.int16
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), kind), layout, "mono")
        frame.rate, frame.pts = 44_100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def animate(path: Path, total: int, milliseconds=100) -> Path:
    frames = [picture(index, total) for index in range(total)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **lossless)
    return path


def refusal(source, **options) -> str:
    with pytest.raises(BadVideo) as caught:
        load(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# --- which frames ---


@given(total=st.integers(1, 500), count=st.integers(1, 600))
def test_the_chosen_are_spread_evenly_from_first_to_last(total, count):
    chosen = spread(range(total), count)
    assert len(chosen) == min(count, total)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    if len(chosen) > 1:
        assert chosen[-1] == total - 1
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1
        assert np.abs(np.asarray(chosen) - np.linspace(0, total - 1, len(chosen))).max() <= 0.5 + 1e-9


@given(
    gaps=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60),
    count=st.integers(2, 70),
)
def test_uneven_times_give_no_frame_twice_and_both_ends(gaps, count):
    times = np.cumsum([0.0, *gaps]).tolist()
    chosen = spread(times, count)
    assert len(chosen) == min(count, len(times))
    assert chosen == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, len(times) - 1)


def test_a_long_pause_is_not_skipped():
    times = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 100]  # by number it would be 0, 4, 7, 11
    assert spread(times, 3) == [0, 10, 11]


# --- video files ---


@needs_av
@pytest.mark.parametrize("kind", KINDS)
def test_a_video_gives_evenly_spread_frames_whatever_holds_it(tmp_path, kind):
    rate = 25 if kind == "mpg" else 10
    loaded = load(encode(tmp_path / f"a.{kind}", rate=rate), frames=4)
    assert [which(frame, 40) for frame in loaded.frames] == [0, 13, 26, 39]
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in loaded.frames)
    assert loaded.notes == ("4 of 40 frames",)
    assert loaded.fps == pytest.approx(3 * rate / 39, rel=0.02)
    assert loaded.seconds == pytest.approx(40 / rate, rel=0.04)


@needs_av
def test_a_short_video_is_given_whole_and_unremarked(tmp_path):
    loaded = load(str(encode(tmp_path / "a.mp4", total=9)))
    assert [which(frame, 9) for frame in loaded.frames] == list(range(9))
    assert loaded.notes == ()
    assert loaded.fps == pytest.approx(10)
    assert loaded.seconds == pytest.approx(0.9)


@needs_av
def test_one_frame_is_the_first_and_has_no_rate(tmp_path):
    loaded = load(encode(tmp_path / "a.mp4"), frames=1)
    assert [which(frame, 40) for frame in loaded.frames] == [0]
    assert loaded.fps is None
    assert loaded.seconds == pytest.approx(4)


@needs_av
def test_uneven_times_are_followed(tmp_path):
    ticks = [*range(0, 20), 60, 100]
    loaded = load(encode(tmp_path / "a.mkv", total=22, ticks=ticks), frames=3)
    assert [which(frame, 22) for frame in loaded.frames] == [0, 20, 21]
    assert loaded.fps == pytest.approx(0.2)


@needs_av
@pytest.mark.parametrize("gop", [1, 5, 1000])
def test_seeking_and_decoding_everything_give_the_same_frames(tmp_path, monkeypatch, gop):
    path = encode(tmp_path / "a.mp4", total=61, gop=gop)

    def missed(*_):
        raise film._Missed

    with monkeypatch.context() as only_seeking:
        only_seeking.setattr(film, "_survey_frames", missed)
        sought = load(path, frames=5)
    monkeypatch.setattr(film, "_seek_frames", missed)
    decoded = load(path, frames=5)
    assert [which(frame, 61) for frame in sought.frames] == [0, 15, 30, 45, 60]
    assert [frame.tobytes() for frame in sought.frames] == [frame.tobytes() for frame in decoded.frames]
    assert (sought.fps, sought.seconds, sought.notes) == (decoded.fps, decoded.seconds, decoded.notes)


@needs_av
def test_a_long_film_is_not_held_in_memory(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", total=200, gop=20)
    kept = []
    monkeypatch.setattr(Frames, "add", lambda self, image, what: (kept.append(what), self.kept.append(image)))
    assert len(load(path, frames=3).frames) == len(kept) == 3


@needs_av
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_phones_rotation_is_applied(tmp_path, turn):
    upright = Image.new("RGB", (64, 48), WHITE)
    upright.paste(RED, (0, 0, 24, 16))
    stored = upright.rotate(-turn, expand=True)
    path = encode(tmp_path / "a.mp4", total=3, size=stored.size, pictures=[stored] * 3, turn=turn)
    for frame in load(path).frames:
        assert frame.size == upright.size
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(upright)).mean() < 12


@pytest.mark.parametrize("matrix", film._UPRIGHT)
def test_every_display_matrix_is_what_it_says(matrix):
    a, b, c, d = matrix
    marks = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)
    turned = np.asarray(Image.fromarray(marks).transpose(film._UPRIGHT[matrix]))
    places = {(a * x + c * y, b * x + d * y): marks[y, x] for y in range(3) for x in range(4)}
    left, top = min(x for x, _ in places), min(y for _, y in places)
    assert turned.size == len(places)
    assert all(turned[y - top, x - left] == mark for (x, y), mark in places.items())


@needs_av
def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = encode(tmp_path / "a.mp4", total=3, aspect=2)
    assert {frame.size for frame in load(path).frames} == {(128, 48)}


@needs_av
@pytest.mark.parametrize("kind", ["mkv", "ts", "mpg", "flv", "webm", "fast.mp4"])
def test_a_video_cut_short_gives_what_is_there(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 60, (40, 48, 64, 3))
    pictures = [Image.fromarray((noise[i] + 20 + i * 4).astype(np.uint8)) for i in range(40)]
    options = {"movflags": "faststart"} if kind.endswith("mp4") else {}
    rate = 25 if kind == "mpg" else 10
    path = encode(tmp_path / f"a.{kind}", pictures=pictures, options=options, rate=rate)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    loaded = load(path, frames=64)
    assert 12 <= len(loaded.frames) < 40
    expected = [float(np.asarray(image).mean()) for image in pictures]
    for frame, mean in zip(loaded.frames, expected, strict=False):
        assert float(np.asarray(frame).mean()) == pytest.approx(mean, abs=6)
    if kind not in ("ts",):  # which says nothing of how long it should be
        assert any("cut short" in note or "says that it lasts" in note for note in loaded.notes), loaded.notes


@needs_av
@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "ts", "flv"])
@pytest.mark.parametrize("from_zero", [True, False])
def test_a_film_cut_without_encoding_it_anew_is_whole(tmp_path, kind, from_zero):
    source = encode(tmp_path / "whole.mp4", total=40, gop=12)
    listed = kind in ("mp4", "mov") and from_zero  # others know no list that hides the frames from the key frame on
    for count in (64, 4):
        loaded = load(cut(source, tmp_path / f"a.{kind}", 1.7, from_zero=from_zero), frames=count)
        first = 17 if listed else 12
        chosen = [first + index for index in spread(range(40 - first), count)]
        assert [which(frame, 40) for frame in loaded.frames] == chosen
        assert loaded.seconds == pytest.approx((40 - first) / 10)
        assert loaded.notes == (() if count == 64 else (f"4 of {40 - first} frames",))
        part = cut(source, tmp_path / f"b.{kind}", 1.7, from_zero=from_zero, from_key=False)
        loaded = load(part, frames=count)
        chosen = [24 + index for index in spread(range(16), count)]
        assert [which(frame, 40) for frame in loaded.frames] == chosen, "the first that can be decoded"
        assert loaded.notes == (() if count == 64 else ("4 of 16 frames",))


@needs_av
def test_a_stream_that_was_joined_in_the_middle(tmp_path):
    whole = encode(tmp_path / "whole.ts", total=40, gop=12).read_bytes()
    (tmp_path / "a.ts").write_bytes(whole[188 * (len(whole) // 376) :])
    loaded = load(tmp_path / "a.ts", frames=64)
    numbers = [which(frame, 40) for frame in loaded.frames]
    assert numbers == list(range(numbers[0], 40))
    assert numbers[0] % 12 == 0


@needs_av
def test_empty_packets_of_avi_are_no_damage(tmp_path):
    """A film of 10 frames a second in a container that counts 20."""
    path = encode(tmp_path / "a.avi", total=12, rate=20, ticks=range(0, 24, 2))
    loaded = load(path)
    assert [which(frame, 12) for frame in loaded.frames] == list(range(12))
    assert loaded.notes == ()
    assert loaded.fps == pytest.approx(10, rel=0.05)


@needs_av
def test_a_damaged_film_gives_the_same_frames_each_time(tmp_path):
    path = encode(tmp_path / "a.mp4", total=60, size=(320, 240), options={"movflags": "faststart"})
    whole, short = path.read_bytes(), 0
    for seed in range(8):
        rng, torn = np.random.default_rng(seed), bytearray(whole)
        for _ in range(20):
            torn[rng.integers(whole.find(b"mdat") + 100, len(torn))] = rng.integers(0, 255)
        path.write_bytes(torn)
        first, *others = [load(path, frames=8) for _ in range(3)]
        assert len(first.frames) == min(8, first.of)
        short += first.of < 60
        for other in others:
            assert (other.of, other.notes) == (first.of, first.notes)
            assert [frame.tobytes() for frame in other.frames] == [frame.tobytes() for frame in first.frames]
    assert short, "the damage was felt"


@needs_av
@pytest.mark.parametrize("kind", KINDS)
def test_a_container_is_known_by_its_content(tmp_path, kind):
    source = encode(tmp_path / f"a.{kind}", total=12, rate=25 if kind == "mpg" else 10)
    expected = [frame.tobytes() for frame in load(source).frames]
    for name in ("film", "film.png", "film.mp4", "film.webm"):
        path = source.rename(tmp_path / name)
        assert is_film(path)
        assert [frame.tobytes() for frame in load(path).frames] == expected
        source = path


def test_pictures_are_no_films_whatever_they_are_called(tmp_path):
    for kind in ("gif", "png", "webp", "avif"):
        if kind == "avif" and not features.check("avif"):
            continue
        path = animate(tmp_path / f"a.{kind}", 5)
        frames = [frame.tobytes() for frame in load(path).frames]
        assert len(frames) == 5
        for name in ("moving", "moving.png", "moving.mp4", "moving.jpg"):
            path = path.rename(tmp_path / name)
            assert not is_film(path)
            assert [frame.tobytes() for frame in load(path).frames] == frames


def test_where_the_content_says_nothing_the_name_does(tmp_path):
    for name, film_by_name in (("a.mp4", True), ("a.png", False), ("a", False)):
        for content in (b"", b"This is not a film."):
            (tmp_path / name).write_bytes(content)
            assert is_film(tmp_path / name) == film_by_name
    assert is_film(tmp_path / "nowhere.mkv")
    assert not is_film(tmp_path)
    assert is_film(Path("x" * 5000 + ".mp4"))
    assert is_film(Path("no\0such.mp4"))


@needs_av
def test_a_video_cut_short_before_its_first_frame(tmp_path):
    for kind, options in (("mp4", {}), ("fast.mp4", {"movflags": "faststart"})):
        path = encode(tmp_path / f"a.{kind}", options=options)
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(b"mdat") + 8])
        assert "cut short" in refusal(path)


@needs_av
def test_sound_alone(tmp_path):
    assert "only sound" in refusal(sound(tmp_path / "a.m4a", "aac"))
    assert "only sound" in refusal(sound(tmp_path / "a.wav", "pcm_s16le"))


@needs_av
def test_a_video_without_frames(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        container.start_encoding()
    refusal(path)


@needs_av
def test_text_named_mp4(tmp_path):
    (tmp_path / "a.mp4").write_text("This is not a film.\n" * 20)
    assert "no video in a format read here" in refusal(tmp_path / "a.mp4")


@needs_av
def test_playlists_open_nothing(tmp_path):
    encode(tmp_path / "real.ts")
    encode(tmp_path / "real.mp4")
    (tmp_path / "a.ffconcat").write_text("ffconcat version 1.0\nfile real.mp4\n")
    (tmp_path / "a.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nreal.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "a.sdp").write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    )
    for name in ("a.ffconcat", "a.m3u8", "a.sdp"):
        assert "no video in a format" in refusal(tmp_path / name)


@needs_av
def test_odd_names_are_names_and_not_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = encode(tmp_path / "a.mp4", total=3)
    for name in ("file:x.mp4", "concat:a|b.mp4", "%03d.mp4", "-i", "naïve 😀.mp4", os.fsdecode(b"\xff\xfe.mp4")):
        (tmp_path / name).write_bytes(path.read_bytes())
        assert len(load(name).frames) == 3


@needs_av
def test_a_video_that_grows_on_the_way(tmp_path):
    small, large = encode(tmp_path / "s.ts", total=12), encode(tmp_path / "l.ts", total=12, size=(96, 80))
    (tmp_path / "a.ts").write_bytes(small.read_bytes() + large.read_bytes())
    sentence = refusal(tmp_path / "a.ts")
    assert "64 × 48" in sentence
    assert "96 × 80" in sentence


def test_without_pyav_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    with pytest.raises(DymuError, match=r"pip install 'dymu\[video\]'"):
        load(tmp_path / "a.mp4")
    assert len(load(animate(tmp_path / "a.gif", 3)).frames) == 3


@needs_av
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_bytes_never_get_further_than_a_sentence(data, tmp_path):
    kind = data.draw(st.sampled_from(["mp4", "mkv", "avi", "ts", "gif", "webp", "png"]))
    path = tmp_path / f"whole.{kind}"
    if not path.exists():
        if kind in ("gif", "webp", "png"):
            animate(path, 12)
        else:
            encode(path, total=12, gop=4)
    broken = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"broken.{kind}"
    path.write_bytes(broken[: data.draw(st.integers(1, len(broken)))])
    with contextlib.suppress(BadVideo):  # anything else that is raised fails the test
        loaded = load(path, frames=5)
        assert 1 <= len(loaded.frames) <= 5
        assert {(frame.mode, frame.size) for frame in loaded.frames} == {("RGB", loaded.frames[0].size)}


# --- animations ---


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_an_animation(tmp_path, kind):
    loaded = load(animate(tmp_path / f"a.{kind}", 41), frames=5)
    assert [which(frame, 41) for frame in loaded.frames] == [0, 10, 20, 30, 40]
    assert loaded.notes == ("5 of 41 frames",)
    assert loaded.fps == pytest.approx(1)
    assert loaded.seconds == pytest.approx(4.1)


def test_an_animation_that_waits_is_followed_in_time(tmp_path):
    path = animate(tmp_path / "a.gif", 6, [100, 100, 100, 100, 3000, 100])
    loaded = load(path, frames=2)
    assert [which(frame, 6) for frame in loaded.frames] == [0, 5]
    assert loaded.seconds == pytest.approx(3.5)
    assert load(path, frames=3).fps == pytest.approx(2 / 3.4)


def test_an_animation_without_times_has_no_rate(tmp_path):
    loaded = load(animate(tmp_path / "a.gif", 6, 0), frames=3)
    assert len(loaded.frames) == 3
    assert loaded.fps is None
    assert loaded.seconds is None


def test_the_stand_in_of_an_animated_png_is_no_frame(tmp_path):
    frames = [picture(index, 4) for index in range(4)]
    Image.new("RGB", (64, 48), RED).save(
        tmp_path / "a.png", save_all=True, append_images=frames, default_image=True, duration=100
    )
    assert [which(frame, 4) for frame in load(tmp_path / "a.png").frames] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_an_animation_cut_short_gives_what_is_there(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)
    frames = [Image.fromarray(one) for one in noise]
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    loaded = load(path)
    assert 3 <= len(loaded.frames) <= 5
    assert "cut short" in loaded.notes[-1]
    path.write_bytes(whole[:200])
    assert "cut short" in refusal(path)


def test_a_still_image_is_one_frame_and_said_to_be(tmp_path):
    for name in ("a.png", "a.jpg", "a.gif"):
        picture(1, 2).save(tmp_path / name)
        loaded = load(tmp_path / name)
        assert len(loaded.frames) == 1
        assert "still image" in loaded.notes[0]


def test_transparency_lies_on_white(tmp_path):
    frames = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)), Image.new("RGBA", (16, 16), (255, 0, 0, 255))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    loaded = load(tmp_path / "a.webp")
    assert [frame.getpixel((3, 3)) for frame in loaded.frames] == [WHITE, RED]
    assert loaded.notes == ("its transparent parts laid on white (1 frame)",)


# --- folders and sequences ---


def test_a_folder_in_the_order_in_which_people_count(tmp_path):
    for index in range(12):
        picture(index, 12).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("not a frame")
    (tmp_path / "frame5.png").rename(tmp_path / "frame5")
    loaded = load(tmp_path)
    assert [which(frame, 12) for frame in loaded.frames] == list(range(12))
    assert loaded.notes == ("1 other file in the folder left out",)
    assert loaded.fps is None
    few = load(tmp_path, frames=2)
    assert [which(frame, 12) for frame in few.frames] == [0, 11]
    assert few.notes[0] == "2 of 12 frames"


def test_what_a_folder_may_hold_wrongly(tmp_path):
    assert "without images" in refusal(tmp_path)
    picture(0, 2).save(tmp_path / "a.png")
    picture(1, 2, (32, 32)).save(tmp_path / "b.png")
    sentence = refusal(tmp_path)
    for part in ("a.png", "64 × 48", "b.png", "32 × 32"):
        assert part in sentence
    (tmp_path / "b.png").write_bytes(b"\x89PNG broken")
    assert "b.png" in refusal(tmp_path)


def test_a_sequence_of_images_is_taken_and_left_alone(tmp_path):
    given = [picture(index, 40).convert("L") for index in range(40)]
    loaded = load(given, frames=4)
    assert [which(frame, 40) for frame in loaded.frames] == [0, 13, 26, 39]
    assert given[0].mode == "L"
    assert loaded.notes == ("4 of 40 frames",)
    assert load(tuple(given[:2])).notes == ()


def test_what_a_sequence_may_hold_wrongly():
    assert "without images" in refusal([])
    assert "frame 2" in refusal([picture(0, 2), "b.png"])
    assert "not a video" in refusal(picture(0, 2))
    assert "not a video" in refusal(7)
    sentence = refusal([picture(0, 2), picture(1, 2, (32, 32))])
    assert "frame 1 is 64 × 48" in sentence
    assert "frame 2 is 32 × 32" in sentence


# --- refused before anything is read ---


def test_missing_empty_and_address(tmp_path):
    assert "does not exist" in refusal(tmp_path / "no.mp4")
    refusal("no\0such.mp4")
    refusal("x" * 5000)
    assert "download it" in refusal("https://example.org/cat.mp4")
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in refusal(tmp_path / "empty.mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "no ordinary file" in refusal(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("frames", [0, -1])
def test_no_frames_are_not_to_be_had(frames):
    assert "at least 1" in refusal([picture(0, 2)], frames=frames)


def test_too_large_and_too_small(tmp_path, monkeypatch):
    assert "too small" in refusal([Image.new("RGB", (3, 3))])
    path = animate(tmp_path / "a.gif", 3)
    monkeypatch.setattr("dymu.media.images.MAX_PIXELS", 64 * 48 - 1)
    assert "million pixels" in refusal(path)
    if av is not None:
        assert "million pixels" in refusal(encode(tmp_path / "a.mp4", total=3))
    assert MAX_PIXELS > 64 * 48


def test_nothing_is_printed(tmp_path, capfd):
    path = animate(tmp_path / "a.gif", 3)
    path.write_bytes(path.read_bytes()[:-20])
    with contextlib.suppress(BadVideo):
        load(path)
    if av is not None:
        path = encode(tmp_path / "a.ts")
        path.write_bytes(path.read_bytes()[:-2000])
        capfd.readouterr()  # the encoder speaks; the reader must not
        load(path)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@needs_av
@pytest.mark.parametrize("kind", ["mkv", "webm", "flv"])
def test_a_loss_of_more_than_one_frame_is_noted(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / f"a.{kind}", pictures=[Image.fromarray(one) for one in noise], gop=4)
    whole = path.read_bytes()
    assert load(path, frames=64).notes == ()
    for part in (0.93, 0.9, 0.8):
        path.write_bytes(whole[: int(len(whole) * part)])
        loaded = load(path, frames=64)
        assert 20 < len(loaded.frames) < 39
        assert any("cut short" in note or "says that it lasts 4.0 s" in note for note in loaded.notes), loaded.notes


@needs_av
@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_an_animated_avif_cut_short_gives_what_is_there(tmp_path):
    path = tmp_path / "a.avif"
    animate(path, 8)
    whole = path.read_bytes()
    assert load(path).notes == ()
    path.write_bytes(whole[:-3])
    loaded = load(path)
    assert [which(frame, 8) for frame in loaded.frames] == list(range(len(loaded.frames)))
    assert 1 < len(loaded.frames) < 8
    assert any("cut short" in note for note in loaded.notes)
