"""`dymu draw`: a sheet of what merges in several pictures, by budget and by layer."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import dymu
import tiny
from dymu.cli import main, models
from dymu.errors import BadThresholds
from dymu.reducers import ThresholdMerge
from dymu.survey import sheet
from dymu.survey.encode import Encoder as Encodes
from dymu.thresholds import Calibrated, Encoder, Thresholds
from tiny_processors import OF_EACH_KIND, processor_for

ROOT = Path(__file__).parents[1]
PHOTO, SCENE = ROOT / "examples" / "photo.jpg", ROOT / "examples" / "scene.png"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def demo() -> models.Loaded:
    return models.load(models.named(str(ROOT / "models" / "demo")), "cpu")


@pytest.fixture
def call(demo: models.Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command as a shell does, with the demo model loaded once: (exit code, stdout, stderr)."""
    monkeypatch.setattr(models, "load", lambda *_: demo)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dymu", *map(str, arguments)])
        try:
            main.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def answer(printed: tuple[int, str, str]) -> dict:
    code, out, err = printed
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_row_for_each_picture_a_column_for_each_budget(call: Call, tmp_path: Path) -> None:
    data = answer(call("draw", PHOTO, SCENE, "-o", tmp_path / "s.png", "--json"))
    budgets = data["budgets"]
    assert len(budgets) == 4
    assert budgets == sorted(budgets)
    assert set(budgets) < set(Thresholds.load(ROOT / "models" / "demo").budgets)
    assert budgets[0] < 0.15 * 256 < 0.7 * 256 < budgets[-1] < 0.85 * 256
    assert [row["image"] for row in data["images"]] == [str(PHOTO), str(SCENE)]
    for row in data["images"]:
        assert row["original"] == 256
        assert row["kept"] == sorted(row["kept"])
        assert 1 < row["kept"][0] < row["kept"][-1] < 256
    drawn = Image.open(tmp_path / "s.png")
    assert drawn.width <= sheet.LONGEST
    assert drawn.width > drawn.height
    assert list(tmp_path.iterdir()) == [tmp_path / "s.png"]


def test_budgets_that_are_named(call: Call, tmp_path: Path) -> None:
    common = ("draw", SCENE, "-o", tmp_path / "s.webp")
    data = answer(call(*common, "-b", "0.5", "-b", 38, "--json"))
    assert data["budgets"] == [128, 38]
    kept = data["images"][0]["kept"]
    assert kept[0] > kept[1]
    _, out, _ = call(*common, "-b", 38)
    assert "budget 38" in out
    assert str(kept[1]) in out


def test_layer_by_layer(call: Call, tmp_path: Path, demo: models.Loaded) -> None:
    """The last is what the model gets, and counts are those of one call that runs all layers."""
    data = answer(call("draw", SCENE, PHOTO, "-o", tmp_path / "s.png", "--layers", "-b", 77, "--json"))
    thresholds = Thresholds.load(ROOT / "models" / "demo")
    with dymu.apply(demo.model, thresholds, budget=77) as handle:
        Encodes(demo.model, demo.processor, handle)([Image.open(path).convert("RGB") for path in (SCENE, PHOTO)])
        assert [list(layer) for layer in zip(*handle.last.layers, strict=True)] == [
            row["kept"] for row in data["images"]
        ]
    one = answer(call("draw", SCENE, "-o", tmp_path / "s.png", "--layers", "--json"))
    assert len(one["budgets"]) == 1
    assert len(one["images"][0]["kept"]) == 10


def test_bad_input_is_one_sentence_and_no_file(call: Call, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    output = tmp_path / "s.png"
    for words, said, code in (
        ((broken,), "not an image", 1),
        ((PHOTO, tmp_path / "none.jpg"), "does not exist", 1),
        ((PHOTO, "-b", 500), "is outside", 1),
        ((PHOTO, "--layers", "-b", 38, "-b", 77), "one -b", 2),
        ((PHOTO, "--model", tmp_path / "none"), "none", 1),
    ):
        got, _, err = call("draw", *words, "-o", output)
        assert got == code
        assert said in err
        assert len(err.strip().splitlines()) == 1
        assert not output.exists()
    shutil.copy(SCENE, output)
    before = output.read_bytes()
    assert "one of the images" in call("draw", output, "-o", output)[2]
    assert output.read_bytes() == before
    assert "does not end in" in call("draw", PHOTO, "-o", tmp_path / "s.txt")[2]


def test_what_cannot_be_drawn_on_is_said(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("the tokens are no grid")

    monkeypatch.setattr(sheet, "by_budget", refuse)
    code, _, err = call("draw", PHOTO, "-o", tmp_path / "s.png")
    assert (code, err) == (1, "dymu: what merged cannot be drawn: the tokens are no grid.\n")


def test_rows_of_many_shapes_fit_on_a_sheet() -> None:
    wide, high = Image.new("RGB", (672, 20)), Image.new("RGB", (60, 672))
    drawn = sheet.sheet([[wide] * 3, [high] * 3], [["1 of 2"] * 3] * 2)
    assert max(drawn.size) <= sheet.LONGEST
    with pytest.raises(ValueError, match="fewer images or budgets"):
        sheet.sheet([[wide] * 200] * 2, [["1"] * 200] * 2)


@pytest.mark.parametrize("family", OF_EACH_KIND)
def test_every_kind_of_family(family: str) -> None:
    """Tiles, windows, sizes of their own: each picture keeps what it keeps alone."""
    model = tiny.build(family)
    processor = processor_for(family)
    photos = [photo.resize((60 + 20 * index, 50)) for index, photo in enumerate(tiny.photos(3))]
    with dymu.apply(model, merge=ThresholdMerge((0.9,) * tiny.LAYERS)) as handle:
        encoder = Encodes(model, processor, handle)
        together = encoder(photos)
        alone = [encoder([photo])[0] for photo in photos]
    assert [report.kept for report in together] == [report.kept for report in alone]
    assert [report.original for report in together] == [report.original for report in alone]
    assert sum(sum(report.kept) for report in together) < sum(sum(report.original) for report in together)


def test_rounds_in_the_prompt_are_the_last_panel() -> None:
    model = tiny.llava("siglip", "qwen2", "llava_onevision")
    layers = (0.8,) * tiny.LAYERS
    thresholds = Thresholds((Calibrated(60, layers, images=(0.5,) * 6, frames=(0.5,) * 6),), image_tokens=147)
    other = Thresholds(thresholds.calibrated, encoder=Encoder("other", 9, tiny.LAYERS, 32, 4, 49), image_tokens=147)
    with pytest.raises(BadThresholds, match="other"):
        sheet.by_layer(model, tiny.full_processor("llava_onevision"), other, 60, tiny.photos(2)[1:])
    (row,) = sheet.by_layer(model, tiny.full_processor("llava_onevision"), thresholds, 60, tiny.photos(2)[1:])
    counts = [kept for _, kept, _ in row]
    assert len(counts) == tiny.LAYERS + 1
    assert counts == sorted(counts, reverse=True)
