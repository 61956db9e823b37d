"""`dymu stats`: every picture is counted once, whatever is killed or broken, and the page needs nothing but itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dymu
from dymu.cli import main, models
from dymu.files import escaped
from dymu.measure.results import BadResults
from dymu.media.features import SIDE, features
from dymu.survey import run
from dymu.survey.file import Header, Row, StatsFile
from dymu.survey.page import POINTS, Made, page
from dymu.survey.run import Counter
from dymu.survey.summary import Costs, Summary, spearman
from dymu.survey.svg import Chart, ticks
from dymu.thresholds import Thresholds

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
PHOTOS = sorted((ROOT / "src" / "dymu" / "bench" / "photos").glob("*.webp"))[:11]
DYMU = [sys.executable, "-c", "from dymu.cli.main import main; main()", "stats"]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for photo in PHOTOS:
        shutil.copy(photo, folder)
    (folder / "<b>broken&.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def demo() -> models.Loaded:
    return models.load(models.named(str(DEMO)), "cpu")


@pytest.fixture
def call(demo: models.Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command as a shell does, with the demo model loaded once: (exit code, stdout, stderr)."""
    monkeypatch.setattr(models, "load", lambda *_: demo)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dymu", "stats", *map(str, arguments)])
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


class Tags(HTMLParser):
    """What a page consists of; every tag must end where it should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_and_its_numbers(call: Call, photos: Path, tmp_path: Path, demo: models.Loaded) -> None:
    data = answer(call(photos, "-o", tmp_path / "s.html", "-b", 77, "-b", "0.15", "--json"))
    assert (data["images"], data["failed"]) == (12, 1)
    assert data["untouched"]["total"] == 11 * 256
    assert [at["budget"] for at in data["budgets"]] == [38, 77]

    kept = {}
    with dymu.apply(demo.model, DEMO, budget=77) as handle:
        for photo in PHOTOS:
            image = Image.open(photo).convert("RGB")
            pixels = demo.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            demo.model.get_image_features(pixels)
            (kept[photo.name],) = handle.last.kept
    counts = list(kept.values())
    at = data["budgets"][1]
    assert (at["total"], at["least"], at["most"]) == (sum(counts), min(counts), max(counts))
    assert at["mean"] == pytest.approx(np.mean(counts), abs=0.01)
    assert at["quantile_95"] == sorted(counts)[10]
    jpeg = [features(Image.open(photo).convert("RGB"))[0] for photo in PHOTOS]
    assert at["spearman_jpeg"]["value"] == pytest.approx(spearman(np.array(jpeg), np.array(counts)).value, abs=1e-3)
    thresholds = Thresholds.load(DEMO)
    told = [thresholds.forecast(photo, 77) for photo in PHOTOS]
    assert at["forecast"]["expected_total"] == pytest.approx(sum(one.expected for one in told), rel=1e-3)
    within = np.mean([count <= one.reserve for count, one in zip(counts, told, strict=True)])
    assert at["forecast"]["within_reserve"]["value"] == pytest.approx(within, abs=1e-3)

    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    tags = Tags(text)
    assert not tags.open
    assert tags.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in tags.addresses)
    assert "url(" not in text
    assert "<script" not in text
    assert (tags.count["svg"], tags.count["img"], tags.count["h2"]) == (6, 10, 7)
    assert "&lt;b&gt;broken&amp;.jpg is not an image" in text
    assert "<b>broken" not in text
    assert f"<b>{max(counts)} of 256</b>" in text
    assert "dymu stats" in text
    assert len(text) < 500_000


def test_what_is_there_is_not_counted_again(
    call: Call, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    count = Counter.__call__

    def noting(self: Counter, batch: list) -> list[Row]:
        counted.extend(source.name for source in batch)
        if len(counted) > stop:
            raise KeyboardInterrupt
        return count(self, batch)

    monkeypatch.setattr(Counter, "__call__", noting)
    words = (photos, "-o", tmp_path / "s.html", "-b", 38, "--batch-size", 2)
    stop = 5
    assert call(*words)[0] != 0
    assert not (tmp_path / "s.html").exists()
    assert (tmp_path / "s.jsonl").read_bytes().count(b"\n") == 5
    with (tmp_path / "s.jsonl").open("ab") as file:
        file.write(b'{"image": "half of a li')
    stop = 100
    counted.clear()
    code, out, _ = call(*words)
    assert code == 0
    assert "11 of 12 pictures; 1 could not be read" in out
    assert len(counted) == 12 - 4 + 1, "those left, and the broken one"
    counted.clear()
    first = (tmp_path / "s.html").read_text()
    assert call(*words)[0] == 0
    assert counted == ["<b>broken&.jpg"]
    without_date = re.compile(r"<dt>date</dt><dd>[^<]*</dd>")
    assert without_date.sub("", (tmp_path / "s.html").read_text()) == without_date.sub("", first)


def test_other_settings_are_refused(call: Call, photos: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(PHOTOS[0], one)
    assert call(one, "-o", tmp_path / "s.html", "-b", 38)[0] == 0
    before = (tmp_path / "s.html").read_bytes(), (tmp_path / "s.jsonl").read_bytes()
    for words, said in (((one, "-b", 77), "differs in budgets"), ((photos, "-b", 38), "differs in sources")):
        code, _, err = call(*words, "-o", tmp_path / "s.html")
        assert code == 1
        assert said in err.splitlines()[-1]
    assert before == ((tmp_path / "s.html").read_bytes(), (tmp_path / "s.jsonl").read_bytes())
    (tmp_path / "t.jsonl").write_text('{"mine": 1}\n')
    assert "no file of this version of dymu stats" in call(one, "-o", tmp_path / "t.html", "-b", 38)[2]
    assert (tmp_path / "t.jsonl").read_text() == '{"mine": 1}\n'


def test_bad_input_is_one_sentence(call: Call, photos: Path, tmp_path: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    (only / "a.png").write_bytes(b"")
    for words, said, code in (
        ((tmp_path / "none", "-o", tmp_path / "s.html"), "does not exist", 1),
        ((photos, "-o", tmp_path / "s.pdf"), "does not end in .html", 1),
        ((photos, "-o", tmp_path / "none" / "s.html"), "is not a folder", 1),
        ((photos, "-o", tmp_path / "s.html", "-b", 500), "is outside", 1),
        ((only, "-o", tmp_path / "s.html"), "none of the 1 images could be read", 1),
    ):
        got, out, err = call(*words)
        assert (got, out) == (code, "")
        assert said in err.splitlines()[-1]
        assert not (tmp_path / "s.html").exists()


def test_two_folders_with_equal_names_and_none_of_forecasts(call: Call, tmp_path: Path) -> None:
    thresholds = Thresholds.load(DEMO)
    plain = Thresholds(thresholds.calibrated, thresholds.encoder)
    plain.save(tmp_path / "plain.json")
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(PHOTOS[ord(name) % 2], tmp_path / name / "photo.webp")
    words = (tmp_path / "a", tmp_path / "b", tmp_path / "a", "-o", tmp_path / "s.html", "-b", 38, "-b", 77, "-b", 192)
    data = answer(call(*words, "--thresholds", tmp_path / "plain.json", "--json"))
    assert data["images"] == 2
    assert [at["forecast"] for at in data["budgets"]] == [None] * 3
    assert [at["spearman_jpeg"] for at in data["budgets"]] == [None] * 3
    text = (tmp_path / "s.html").read_text()
    assert "Told beforehand" not in text
    assert "a/photo.webp" in text
    assert "b/photo.webp" in text


def test_large_pictures_are_not_held_together(demo: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from dymu.captioning.sources import Source

    monkeypatch.setattr(run, "PIXELS", 1)
    sources = [Source(path.name, path) for path in PHOTOS[:3]]
    with dymu.apply(demo.model, DEMO, budget=38) as handle:
        counter = Counter(demo.model, demo.processor, handle, Thresholds.load(DEMO), [38])
        sizes = []
        encode = counter.encoder.__class__.__call__
        monkeypatch.setattr(
            counter.encoder.__class__,
            "__call__",
            lambda self, images: sizes.append(len(images)) or encode(self, images),
        )
        rows = counter(sources)
        assert sizes == [1, 1, 1]

        def refuse(self: object, images: list) -> list:
            if len(images) > 1 or images[0].size == (5, 50):
                raise ValueError("no such size\nmore")
            return encode(self, images)

        monkeypatch.setattr(counter.encoder.__class__, "__call__", refuse)
        mixed = {
            "odd": Image.new("RGB", (5, 50)),
            **{path.name: Image.open(path).convert("RGB") for path in PHOTOS[:3]},
        }
        odd, *others = counter._counted(mixed)
        assert odd.error == "odd is not taken by the model (no such size): give it another size or form."
        assert others == rows


def header() -> Header:
    names = dict.fromkeys(("date", "model", "weights", "dtype", "processor", "thresholds", "forecasts"), "")
    return Header(dymu_stats=1, sources=[], budgets=[20.0, 77.0], versions={}, **names)


def test_rows_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="or an `error`"):
        Row("a.png")
    with pytest.raises(ValueError, match="or an `error`"):
        Row("a.png", 256, [20], error="no")
    with StatsFile(tmp_path / "s.jsonl", header()) as file:
        file.add(Row("a.png", 256, [20]))
    with pytest.raises(BadResults, match=r"line of a\.png .* 2 numbers"):
        StatsFile(tmp_path / "s.jsonl", header())


def test_a_page_of_many_pictures_stays_small() -> None:
    random = np.random.default_rng(0)
    rows = [
        Row(escaped(f"{index}\udcff.jpg"), 256, [int(count), int(count) * 2], count / 300, [30.0, 60.0], [45, 90])
        for index, count in enumerate(random.integers(10, 100, POINTS + 1000))
    ]
    rows += [Row(f"bad{index}", error="<why>") for index in range(60)]
    summary = Summary.of(rows, [30, 60])
    text = page(summary, [], [], Made("dymu stats a -o b", {"model": "demo"}))
    assert not Tags(text).open
    assert "4,000 drawn at random" in text
    assert "And 10 more" in text
    assert "&lt;why&gt;" in text
    assert len(text) < 500_000
    assert summary.budgets[0].complexity.value == pytest.approx(1)
    simplest, most_complex = summary.extremes(6)
    assert max(row.kept[1] for row in simplest) == 20
    assert min(row.kept[1] for row in most_complex) == 198


def test_extremes_of_few() -> None:
    def names(count: int) -> list[list[str]]:
        summary = Summary.of([Row(str(index), 256, [index + 1]) for index in range(count)], [20])
        return [[row.image for row in some] for some in summary.extremes(2)]

    assert names(1) == [[], ["0"]]
    assert names(3) == [["0"], ["2"]]
    assert names(9) == [["0", "1"], ["8", "7"]]


def test_rank_correlation() -> None:
    x = np.arange(20.0)
    assert spearman(x, x**3).value == 1
    assert spearman(x, -x).low == -1
    assert spearman(x[:9], x[:9]) is None
    assert spearman(x, x * 0) is None
    tied = np.repeat(np.arange(10.0), 2)
    shuffled = np.random.default_rng(0).permutation(tied)
    found = spearman(tied, shuffled)
    stats = pytest.importorskip("scipy.stats")
    assert found.value == pytest.approx(stats.spearmanr(tied, shuffled).statistic)
    assert found.low < found.value < found.high


def test_costs() -> None:
    assert Costs.of(np.array([1, 2, 3, 4])).data() == {
        "total": 10, "mean": 2.5, "sd": 1.12, "least": 1, "quantile_95": 4, "most": 4,
    }  # fmt: skip


@pytest.mark.parametrize("span", [(0, 1), (0, 0.37), (0, 256), (17, 4_000_000), (0, 9), (0.1, 0.11)])
def test_ticks_are_round_and_few(span: tuple[float, float]) -> None:
    found = ticks(span)
    assert 2 <= len(found) <= 8
    assert all(span[0] - 1e-9 <= tick <= span[1] * (1 + 1e-9) for tick in found)


def test_a_chart_of_nothing_wide() -> None:
    chart = Chart((0, 0), (0, 0), "a & b", "c")
    chart.points([0], [0])
    chart.bars([0, 1], [0])
    assert "nan" not in chart.svg("title")
    assert "a &amp; b" in chart.svg("title")


def test_bytes_per_pixel() -> None:
    flat, noise = Image.new("RGB", (64, 64)), Image.effect_noise((300, 300), 90).convert("RGB")
    flat_bytes, noise_bytes = (np.exp(features(image)[0]) / SIDE**2 for image in (flat, noise))
    assert flat_bytes < 0.1 < noise_bytes


def test_a_killed_command_goes_on(photos: Path, tmp_path: Path) -> None:
    words = [*DYMU, str(photos), "-o", str(tmp_path / "s.html"), "--batch-size", "1", "-b", "38"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    counts = tmp_path / "s.jsonl"
    for _ in range(600):
        if counts.exists() and counts.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = counts.read_bytes().splitlines()[:3]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 12
    assert counts.read_bytes().splitlines()[:3] == before
