"""Contact sheets that show every frame, and animations that hold every frame."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from dymu.errors import BadOutput
from dymu.media.contact_sheet import GAP, contact_sheet, save_animation

RED, WHITE = (255, 0, 0), (255, 255, 255)


def plain(count: int, size=(64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 + index * 7 % 240, 60, 90)) for index in range(count)]


def scenes(count: int, size=(48, 32)) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


@given(
    count=st.integers(1, 40),
    columns=st.none() | st.integers(1, 50),
    size=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    labelled=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_sheet_keeps_to_its_size_on_a_white_edge(count, columns, size, labelled):
    labels = [f"frame {index}" for index in range(count)] if labelled else None
    sheet = contact_sheet(plain(count, size), columns, labels, longest=2048)
    assert sheet.mode == "RGB"
    assert max(sheet.size) <= 2048
    pixels = np.asarray(sheet)
    assert (pixels[:GAP] == 255).all()
    assert (pixels[-GAP:] == 255).all()
    assert (pixels[:, :GAP] == 255).all()


def test_every_frame_stands_in_its_place():
    frames = plain(5)
    sheet = contact_sheet(frames, columns=3)
    assert sheet.size == (3 * 64 + 4 * GAP, 2 * 48 + 3 * GAP)
    for index, frame in enumerate(frames):
        left, top = GAP + index % 3 * (64 + GAP), GAP + index // 3 * (48 + GAP)
        shown = sheet.crop((left, top, left + 64, top + 48))
        assert np.array_equal(np.asarray(shown), np.asarray(frame))
    assert sheet.getpixel((sheet.width - GAP - 5, sheet.height - GAP - 5)) == WHITE


def test_a_label_stands_below_its_frame_and_within_its_width():
    bare = contact_sheet(plain(2), columns=2)
    short = contact_sheet(plain(2), columns=2, labels=["one", ""])
    long = contact_sheet(plain(2), columns=2, labels=["a label much wider than the frame above it", ""])
    for labelled in (short, long):
        assert labelled.height > bare.height
        below = np.asarray(labelled)[GAP + 48 :]
        assert (below[:, GAP : GAP + 64] < 128).any()
        assert (below[:, GAP + 64 :] == 255).all()


def test_smaller_frames_are_centred_and_none_is_enlarged():
    sheet = contact_sheet([Image.new("RGB", (64, 48), RED), Image.new("L", (32, 24), 0)], columns=2)
    assert sheet.size == (2 * 64 + 3 * GAP, 48 + 2 * GAP)
    left = GAP + 64 + GAP
    assert sheet.getpixel((left + 2, GAP + 2)) == WHITE
    assert sheet.getpixel((left + 32, GAP + 24)) == (0, 0, 0)


def test_large_frames_are_made_smaller():
    sheet = contact_sheet(plain(4, (1920, 1080)), labels=list("abcd"), longest=800)
    assert 780 <= max(sheet.size) <= 800


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: contact_sheet([]), "at least 1"),
        (lambda: contact_sheet(plain(2), columns=0), "0 columns"),
        (lambda: contact_sheet(plain(2), labels=["one"]), "1 labels do not fit 2"),
        (lambda: contact_sheet(plain(40), longest=60), "do not fit into 60"),
        (lambda: save_animation(plain(2), "a.mp4", 5), r"\.gif, \.webp or \.png"),
        (lambda: save_animation([], "a.gif", 5), "at least 1"),
        (lambda: save_animation([*plain(1), *plain(1, (9, 9))], "a.gif", 5), "one size"),
        (lambda: save_animation(plain(2), "a.gif", 0), "above 0"),
        (lambda: save_animation(plain(2), "a.gif", float("nan")), "above 0"),
        (lambda: save_animation(plain(2), "a.gif", 1e-4), "higher rate"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        call()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
@given(pattern=st.lists(st.integers(0, 3), min_size=2, max_size=12), fps=st.floats(0.5, 60))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_animation_holds_every_frame_even_those_that_are_alike(tmp_path, kind, pattern, fps):
    different = scenes(4)
    frames = [different[index] for index in pattern]
    path = tmp_path / f"a.{kind}"
    save_animation(frames, path, fps)
    assert os.listdir(tmp_path) == [path.name]
    with Image.open(path) as opened:
        assert opened.n_frames == len(frames)
        durations = []
        for shown, frame in zip(ImageSequence.Iterator(opened), frames, strict=True):
            shown.load()
            durations.append(shown.info["duration"])
            off = np.abs(np.asarray(shown.convert("RGB")).astype(int) - np.asarray(frame))
            if kind == "gif":
                assert off.mean() < 30  # 255 of 1,536 random colours
            else:
                assert (off != 0).sum() <= 1
                assert off.max() <= 1
    assert sum(durations) == pytest.approx(1000 * len(frames) / fps, abs=11)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_frames_of_one_colour_and_a_single_frame(tmp_path, kind):
    for count in (1, 5):
        save_animation([Image.new("RGB", (16, 16), WHITE)] * count, tmp_path / f"a.{kind}", 10)
        with Image.open(tmp_path / f"a.{kind}") as opened:
            assert getattr(opened, "n_frames", 1) == count
            assert opened.convert("RGB").getpixel((3, 3)) == WHITE


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    save_animation(plain(2), path, 5)
    before = path.read_bytes()

    def full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadOutput, match="no space"):
        save_animation(plain(3), path, 5)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.gif"]
