"""Thresholds: what is written is read, what does not fit is refused with one sentence."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import huggingface_hub
import msgspec
import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hypothesis import given
from hypothesis import strategies as st

import dymu
import tiny
from dymu.errors import BadBudget, BadOutput, BadThresholds
from dymu.thresholds import VERSION, Calibrated, Encoder, OverTime, Thresholds, beside

ENCODER = Encoder("clip_vision_model", layers=4, depth=3, hidden_size=32, heads=4, tokens=49)


def thresholds(**changes: object) -> Thresholds:
    entries = (
        Calibrated(10, (0.5, 0.6, 0.7), achieved=10.1, sd=2.0, min=7, max=14),
        Calibrated(20, (0.7, 0.8, 2.0), achieved=20.0, sd=3.0, min=12, max=30),
        Calibrated(40, (0.9, 0.9, 2.0), achieved=40.0, sd=1.0, min=37, max=43),
    )
    fields = {"calibrated": entries, "encoder": ENCODER, "schedule": "linear", "model": "tiny", "images": 5}
    return Thresholds(**{**fields, **changes})


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "t.json"
    saved = thresholds(skipped=({"image": "a.jpg", "why": "cut short"},), created="2026-01-01", dymu="0.1.0")
    saved.save(path)
    assert Thresholds.load(path) == saved
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_knows_its_file_as_well(tmp_path):
    thresholds().save(tmp_path / "t.json")
    loaded = Thresholds.load(tmp_path / "t.json")
    for again in (copy.copy(loaded), copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert again == loaded
        assert again.source == loaded.source == str(tmp_path / "t.json")
    assert pickle.loads(pickle.dumps(thresholds())).source == ""


def test_shown_in_one_line(tmp_path):
    thresholds().save(tmp_path / "t.json")
    shown = repr(Thresholds.load(tmp_path / "t.json"))
    assert shown == f"<Thresholds for 10, 20, 40 image tokens, clip_vision_model of 4 layers, {tmp_path}/t.json>"
    assert repr(thresholds(encoder=None)) == "<Thresholds for 10, 20, 40 image tokens, no encoder named, not saved>"


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_files_of_the_older_pairing_are_shown_and_not_applied_behind_a_class_token(tmp_path, tower):
    path = tmp_path / "t.json"
    model = tiny.llava(tower)
    encoder = msgspec.structs.replace(ENCODER, model_type=model.config.vision_config.model_type)
    thresholds(encoder=encoder).save(path)
    body = json.loads(path.read_text())
    assert body["version"] == VERSION == 3
    path.write_text(json.dumps({**body, "version": 1}))
    old = Thresholds.load(path)
    assert old.per_layer(10) == [0.5, 0.6, 0.7]
    old.save(tmp_path / "again.json")
    assert Thresholds.load(tmp_path / "again.json").version == old.version == 1
    first_dropped = tiny.llava("siglip")
    first_dropped.config.vision_feature_select_strategy = "default"  # its first patch, as if that were a class token
    if tower == "siglip":
        with pytest.raises(BadThresholds, match="did not count the 1 ahead"):
            dymu.apply(first_dropped, path, budget=20)
        dymu.apply(model, path, budget=20).remove()
    else:
        with pytest.raises(BadThresholds, match=r"t\.json was calibrated with an older pairing.*dymu calibrate"):
            dymu.apply(model, path, budget=20)
        dymu.apply(model, thresholds(encoder=encoder), budget=20).remove()  # nothing was left behind


def test_names_that_begin_with_a_tilde_or_are_long_or_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("~draft.json", "~/at-home.json", "x" * 250 + ".json", "." + "y" * 254):
        thresholds().save(name)
        assert Thresholds.load(name) == thresholds()
    assert (tmp_path / "home/at-home.json").is_file()
    assert (tmp_path / "~draft.json").is_file()
    Path("link.json").symlink_to("home/target.json")  # of nothing, and then of a file
    for changed in (thresholds(), thresholds(model="other")):
        changed.save("link.json")
        assert Path("link.json").is_symlink()
        assert Thresholds.load("home/target.json") == changed
    assert not list(tmp_path.rglob(".dymu*"))


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.json"
    path.write_text("as it was")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(BadOutput, match=r"t\.json could not be written \(File too large\) and is as it was"):
            thresholds().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "as it was"
    assert os.listdir(tmp_path) == ["t.json"]
    with pytest.raises(BadOutput, match=r"nosuch/t\.json could not be written \(No such file or directory\)"):
        thresholds().save(tmp_path / "nosuch/t.json")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub's cache, which holds one repository with thresholds; nothing else can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub/models--someone--full"
    (repository / "snapshots/0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    for ref in ("main", "v2"):
        (repository / "refs" / ref).write_text("0123")
    thresholds().save(repository / "snapshots/0123/thresholds.json")
    return tmp_path / "hub"


def not_there(kind: type[HfHubHTTPError]) -> Callable[..., NoReturn]:
    """What the hub's client does where it does not find something."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise kind("404 Client Error.\n\nEntry Not Found", response=SimpleNamespace(headers={}, request=None))

    return refuse


def test_thresholds_come_from_a_folder_and_from_the_hub(tmp_path, hub):
    (tmp_path / "model").mkdir()
    thresholds(model="in a folder").save(tmp_path / "model/thresholds.json")
    for name in ("model", tmp_path / "model"):
        assert Thresholds.load(name).model == "in a folder"
        assert Thresholds.load(name).source == str(Path(name) / "thresholds.json")
    for revision in (None, "v2"):
        loaded = Thresholds.load("someone/full", revision=revision)
        assert (loaded, loaded.source) == (thresholds(), "someone/full")
    assert beside("someone/full", "thresholds=") == thresholds()
    assert beside("model", "thresholds=").model == "in a folder"
    with dymu.apply(tiny.llava("clip"), "someone/full", budget=20) as handle:
        assert handle.budget == 20
    for name in ("model", "someone/full"):
        model = tiny.llava("clip")
        model.config._name_or_path = name
        with dymu.apply(model, budget=20) as handle:
            assert handle.budget == 20
    (tmp_path / "someone").mkdir()
    thresholds(model="nearer").save(tmp_path / "someone/full")  # what is here goes first
    assert Thresholds.load("someone/full").model == "nearer"


def test_thresholds_that_are_nowhere_are_one_sentence(tmp_path, hub, monkeypatch):
    (tmp_path / "model").mkdir()

    def refusal(look, *args: str) -> str:
        with pytest.raises(BadThresholds) as caught:
            look(*args)
        assert "\n" not in str(caught.value)
        assert "dymu calibrate" in str(caught.value)
        return str(caught.value)

    assert "someone/nosuch ships no thresholds.json (it is no folder here, and the hub cannot be reached, " in refusal(
        Thresholds.load, "someone/nosuch"
    )
    assert "model ships no thresholds.json: name a file" in refusal(Thresholds.load, "model")
    for name in ("models/t.json", "a/b/c", "no such", "gpt2"):
        assert f"cannot read the thresholds file {name}: no such file" in refusal(Thresholds.load, name)
    with pytest.raises(BadThresholds, match=r"cannot read some/encoder-72out\.pth"):
        Thresholds.load("some/encoder-72out.pth")
    for name in ("model", "someone/bare", "gpt2", "", "a/b/c"):
        sentence = refusal(beside, name, "thresholds=FILE")
        assert sentence.startswith(f"{name or 'this model'} ships no thresholds.json")
        assert "name one with thresholds=FILE" in sentence
    for kind, says in (
        (RepositoryNotFoundError, "the hub has no such repository, or does not show it to you"),
        (RevisionNotFoundError, "the repository has no such revision"),
        (RemoteEntryNotFoundError, "the repository has no such file"),
        (HfHubHTTPError, r"404 Client Error"),
    ):
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_there(kind))
        assert f"(it is no folder here, and {says})" in refusal(Thresholds.load, "someone/bare")
    for value in (5, None, b"t.json", {"calibrated": []}):
        with pytest.raises(BadThresholds, match="thresholds are a dymu"):
            Thresholds.load(value)


def test_thresholds_go_to_the_hub(monkeypatch):
    """Its client is replaced; what it is asked for stays."""
    asked = []

    def upload(**options: object) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *args, **options: asked.append((*args, options)))
    monkeypatch.setattr(huggingface_hub, "upload_file", upload)
    assert thresholds().push_to_hub("someone/full", private=True, commit_message="why") == "https://hub/commit/1"
    assert asked[0] == ("someone/full", {"private": True, "token": None, "exist_ok": True})
    assert asked[1]["path_in_repo"] == "thresholds.json"
    assert asked[1]["commit_message"] == "why"
    assert msgspec.json.decode(asked[1]["path_or_fileobj"], type=Thresholds) == thresholds()

    monkeypatch.setattr(huggingface_hub, "upload_file", not_there(RepositoryNotFoundError))
    with pytest.raises(
        BadOutput, match=r"cannot be uploaded to someone/full \(the hub has no such repository"
    ) as caught:
        thresholds().push_to_hub("someone/full")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadThresholds, match="NaN"):
        thresholds(calibrated=(Calibrated(10, (0.5, math.nan, 0.7)),)).push_to_hub("someone/full")


def test_the_hub_is_not_reached_for_an_upload():
    with pytest.raises(BadOutput, match=r"cannot be uploaded to a/b \(the hub cannot be reached, "):
        thresholds().push_to_hub("a/b")


def test_thresholds_between_budgets_are_interpolated():
    t = thresholds()
    assert t.per_layer(10) == [0.5, 0.6, 0.7]
    assert t.per_layer(10 * 2**0.5) == pytest.approx([0.6, 0.7, 0.85])
    assert t.per_layer(20 * 2**0.5) == pytest.approx([0.8, 0.85, 2.0])
    assert t.per_layer(20 / 49) == pytest.approx([0.7, 0.8, 2.0])


@given(st.floats(10, 40), st.floats(10, 40))
def test_a_lower_budget_has_no_higher_thresholds(one, other):
    low, high = sorted((one, other))
    t = thresholds()
    assert all(a <= b + 1e-12 for a, b in zip(t.per_layer(low), t.per_layer(high), strict=True))


@pytest.mark.parametrize("budget", ["15", True, [15], b"15", torch.tensor([1, 2]), {}])
def test_a_budget_that_is_no_number_is_refused(budget):
    with pytest.raises(BadBudget, match="is a number"):
        thresholds().per_layer(budget)


@pytest.mark.parametrize("budget", [9, 41, 0.1, 0.99, 0, -3, 1.0, 1])
def test_a_budget_outside_the_calibrated_range_is_refused(budget):
    with pytest.raises(BadBudget, match=r"outside 10 to 40.*dymu calibrate"):
        thresholds().per_layer(budget)


def test_a_missing_budget_is_fine_only_where_there_is_one():
    with pytest.raises(BadBudget, match="no budget"):
        thresholds().per_layer()
    assert thresholds(calibrated=thresholds().calibrated[:1]).per_layer() == [0.5, 0.6, 0.7]


def test_files_that_are_not_thresholds_are_refused(tmp_path):
    path = tmp_path / "t.json"
    thresholds().save(path)
    whole = path.read_text()
    body = json.loads(whole)

    def refusal(text: str) -> str:
        path.write_text(text)
        with pytest.raises(BadThresholds) as caught:
            Thresholds.load(path)
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    for cut in (0, 1, len(whole) // 2, len(whole) - 3):
        assert "cut short" in refusal(whole[:cut])
    for text in ("[1, 2]", "{}", "null", '{"format": "gguf", "version": 1}', "[" * 100_000, '{"a":' * 100_000):
        assert "is no dymu thresholds file" in refusal(text)
    for version in (VERSION + 1, 99):
        assert "update dymu" in refusal(json.dumps({**body, "version": version}))
    for version in (0, -3, True, "1", None, 1.5, 10**400):
        assert "`$.version`" in refusal(json.dumps({**body, "version": version}))
    shorter = [{**body["calibrated"][0], "thresholds": [0.5]}, *body["calibrated"][1:]]
    assert "one threshold per merging layer" in refusal(json.dumps({**body, "calibrated": shorter}))
    assert "as many rounds" in refusal(json.dumps({**body, "calibrated": [{**shorter[1], "images": [1]}, shorter[2]]}))
    for layers in ([1, 3], [7]):
        assert "not some of 0 to 2" in refusal(json.dumps({**body, "merge_layers": layers}))
    assert "calibrated" in refusal(json.dumps({k: v for k, v in body.items() if k != "calibrated"}))


def test_two_entries_of_one_budget_are_refused(tmp_path):
    path, entries = tmp_path / "t.json", thresholds().calibrated
    with pytest.raises(ValueError, match="two entries in `calibrated` have the budget 20"):
        thresholds(calibrated=(*entries, msgspec.structs.replace(entries[1], budget=20.0)))
    thresholds().save(path)
    path.write_text(path.read_text().replace('"budget": 40', '"budget": 20'))
    with pytest.raises(BadThresholds, match=r"t\.json .*the budget 20"):
        Thresholds.load(path)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Calibrated(-1, (0.5, 0.6, 0.7)), "budget"),
        (Calibrated(10, (0.5, math.nan, 0.7)), "NaN"),
        (Calibrated(10, (0.5, 0.6, 0.7), achieved=math.inf), "NaN or infinite"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, entry, says):
    path = tmp_path / "t.json"
    path.write_text("as it was")
    with pytest.raises(BadThresholds, match=rf"this set of thresholds cannot be saved as .*t\.json .*{says}"):
        thresholds(calibrated=(entry,)).save(path)
    assert path.read_text() == "as it was"


WRONG: dict[str, list[object]] = {
    "calibrated": [[], 1, "a", None, {"a": 1}, [[]], [1]],
    "calibrated.budget": ["96", -1, 0, True, None, [1]],
    "calibrated.thresholds": ["a", None, ["a", 1, 2], [None, 1, 2], [True, 1, 2], {"0": 1}, [[1], 1, 2]],
    "calibrated.achieved": ["a", True, [1]],
    "calibrated.sd": ["a", True, [1]],
    "calibrated.min": ["a", True, 1.5, -1, [1]],
    "calibrated.max": ["a", True, 1.5, 10**400],
    "calibrated.images": ["a", None, [None], 1],
    "calibrated.frames": ["a", None, [None], 1],
    "encoder": [1, "a", [], {}, {"model_type": "clip"}],
    "encoder.model_type": [1, None, ["a"]],
    **{
        f"encoder.{name}": ["a", None, True, 1.5, -1, [3], 10**400]
        for name in ("layers", "hidden_size", "heads", "tokens")
    },
    "encoder.depth": ["a", None, True, 1.5, -1, [3]],
    "schedule": [1, None, ["linear"]],
    "merge_layers": ["13", [], [-1], [1.0], [True], 1, {"1": 2}],
    "over_time": [1, None, "a", [1], [{}]],
    **{f"over_time.{name}": ["a", None, True, -1, [1]] for name in ("budget", "per_second", "achieved", "seconds")},
    "over_time.threshold": ["a", None, True, [1]],
    "over_time.videos": ["a", None, True, 0, 1.5],
    "forecasts": [1, "a", [], {}, {"features": ["a"]}],
    "model": [1, None, []],
    "image_tokens": ["a", True, -1, [1]],
    "images": ["a", True, 1.5, -1],
    "skipped": [1, "a", None, [1], [{"image": 1}]],
    "created": [1, None, []],
    "dymu": [1, None, []],
    "unheard_of": [1],
    "calibrated.unheard_of": [1],
    "encoder.unheard_of": [1],
}
"""By field, values of a wrong kind."""


@pytest.mark.parametrize("field", WRONG)
def test_any_field_of_a_wrong_kind_is_named(tmp_path, field):
    path = tmp_path / "t.json"
    over_time = OverTime(budget=10, per_second=20, threshold=0.9, achieved=20.1, videos=3, seconds=9)
    thresholds(over_time=(over_time,)).save(path)
    Thresholds.load(path)
    body = json.loads(path.read_text())
    outer, _, inner = field.partition(".")
    holder = body if not inner else body[outer][0] if isinstance(body[outer], list) else body[outer]
    for value in WRONG[field]:
        before = holder.get(inner or outer, ...)
        holder[inner or outer] = value
        path.write_text(json.dumps(body))
        with pytest.raises(BadThresholds) as caught:
            Thresholds.load(path)
        message = str(caught.value)
        assert str(path) in message
        assert (inner or outer).split("_")[0] in message
        assert "\n" not in message
        if before is ...:
            del holder[inner or outer]
        else:
            holder[inner or outer] = before
    path.write_text(json.dumps(body).replace("20.1", "1e999"))
    with pytest.raises(BadThresholds, match="out of range"):
        Thresholds.load(path)
    path.write_text(json.dumps(body).replace("20.1", "NaN"))
    with pytest.raises(BadThresholds, match="malformed"):
        Thresholds.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(BadThresholds, match=r"nothing\.json: no such file.*check the path"):
        Thresholds.load(tmp_path / "nothing.json")
    with pytest.raises(BadThresholds, match=r"ships no thresholds\.json"):
        Thresholds.load(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(BadThresholds, match="calibrate it again"):
        Thresholds.load(path)


def test_thresholds_of_another_model_are_refused_and_nothing_is_changed():
    model = tiny.llava("siglip")
    with pytest.raises(BadThresholds, match=r"model type clip_vision_model instead of siglip_vision_model"):
        dymu.apply(model, thresholds(), budget=20)
    model = tiny.llava("clip", layer=-1)
    with pytest.raises(BadThresholds, match="depth 3 instead of 4"):
        dymu.apply(model, thresholds(), budget=20)
    with pytest.raises(BadBudget):
        dymu.apply(tiny.llava("clip"), thresholds(), budget=99)


def test_the_budget_can_change(tmp_path):
    thresholds().save(tmp_path / "t.json")
    model = tiny.llava("clip")
    with dymu.apply(model, tmp_path / "t.json", budget=10) as handle:
        model.get_image_features(tiny.pictures(2))
        few = handle.last.kept
        handle.budget = 40 / 49
        assert handle.budget == pytest.approx(40)
        model.get_image_features(tiny.pictures(2))
        assert sum(handle.last.kept) > sum(few)
        with pytest.raises(BadBudget):
            handle.budget = 5
        assert handle.budget == pytest.approx(40)
    with dymu.apply(model, merge=dymu.FixedMerge(12)) as handle, pytest.raises(BadBudget, match="fixed rule"):
        handle.budget = 10


def test_apply_wants_one_rule():
    with pytest.raises(BadThresholds, match=r"this model ships no thresholds\.json"):
        dymu.apply(tiny.llava())
    with pytest.raises(ValueError, match="either thresholds"):
        dymu.apply(tiny.llava(), thresholds(), merge=dymu.FixedMerge(12))
    with pytest.raises(BadBudget, match="needs thresholds"):
        dymu.apply(tiny.llava(), merge=dymu.FixedMerge(12), budget=12)
    with pytest.raises(ValueError, match="exact, representative"):
        dymu.apply(tiny.llava(), thresholds(), budget=12, unmerge="compact!")


@pytest.mark.parametrize("prefix", ["visual.transformer.resblocks.", "visual.trunk.blocks."])
@pytest.mark.parametrize("nested", [False, True])
def test_the_authors_checkpoints_are_read(tmp_path, prefix, nested):
    """A state dict with one scalar per layer; 1.0 means that the layer does not merge."""
    values = [1.0, 0.9, 0.85, 0.8]
    state = {f"{prefix}{layer}.threshold": torch.tensor(value) for layer, value in reversed([*enumerate(values)])}
    state["visual.conv1.weight"] = torch.zeros(2, 2)
    path = tmp_path / "ViT-L-14-336-tome-72out.pth"
    torch.save({"epoch": 1, "state_dict": state} if nested else state, path)
    loaded = Thresholds.load(path)
    assert loaded.budgets == [72]
    assert loaded.version == VERSION  # their code always counted from the first token
    assert loaded.per_layer() == pytest.approx([2.0, 0.9, 0.85, 0.8])
    model = tiny.llava("clip")
    with dymu.apply(model, path) as handle:
        model.get_image_features(tiny.pictures(2))
        assert handle.last.layers[0] == [49, 49]
        assert handle.last.kept != [49, 49]
    with pytest.raises(BadThresholds, match=r"4 layers.*merges in 2 of 5"):
        loaded.check_fits(Encoder("clip_vision_model", layers=5, depth=2, hidden_size=32, heads=4, tokens=49))


def test_budgets_of_images_of_any_size_fit_models_that_take_them() -> None:
    """Of images that are one picture each the mean stands for both; of tiles it does not."""
    own_sizes = thresholds(image_tokens=48.7)
    own_sizes.check_fits(ENCODER)
    assert own_sizes.tokens_for(0.5) == pytest.approx(0.5 * 48.7)
    of_tiles = thresholds(image_tokens=130.5)
    of_tiles.check_fits(ENCODER, cuts_images=True)
    with pytest.raises(BadThresholds, match="calibrated on images cut into tiles, and this model's are of one picture"):
        of_tiles.check_fits(ENCODER)
    with pytest.raises(BadThresholds, match="calibrated on images of one picture each, and this model's are cut into"):
        thresholds().check_fits(ENCODER, cuts_images=True)
    thresholds(image_tokens=49).check_fits(ENCODER, cuts_images=True)  # none of them needed a second tile


def test_thresholds_are_of_units_of_one_size(tmp_path: Path) -> None:
    pairs = msgspec.structs.replace(ENCODER, unit=2)
    with pytest.raises(BadThresholds, match=r"another vision encoder \(unit 1 instead of 2\)"):
        thresholds().check_fits(pairs)
    for number, encoder in enumerate((ENCODER, pairs), 1):
        path = tmp_path / "t.json"
        thresholds(encoder=encoder).save(path)
        written = json.loads(path.read_text())["encoder"]
        assert written.get("unit") == (None if number == 1 else number)  # older versions read files without it
        assert Thresholds.load(path).encoder == encoder


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_checkpoint_executes_nothing(tmp_path):
    trap = tmp_path / "executed"
    for name, write in (("a-72out.pth", torch.save), ("b-72out.pt", lambda o, p: p.write_bytes(pickle.dumps(o)))):
        path = tmp_path / name
        write({"0.threshold": Harmful(trap)}, path)
        with pytest.raises(BadThresholds, match="nothing in it was executed"):
            Thresholds.load(path)
        assert not trap.exists()


def test_checkpoints_without_thresholds_or_budget_are_refused(tmp_path):
    path = tmp_path / "ViT-72out.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(BadThresholds, match="holds no thresholds"):
        Thresholds.load(path)
    path = tmp_path / "ViT.pth"
    torch.save({"0.threshold": torch.tensor(0.5)}, path)
    with pytest.raises(BadThresholds, match="rename it"):
        Thresholds.load(path)
    for name, state in (
        ("ViT-0out.pth", {"0.threshold": torch.tensor(0.5)}),
        ("ViT-9out.pth", {"0.threshold": torch.tensor([0.5, 0.6])}),
        ("ViT-9out.pth", {"0.threshold": "half"}),
        ("ViT-9out.pth", {"a.0.threshold": torch.tensor(0.5), "b.0.threshold": torch.tensor(0.6)}),
        ("ViT-9out.pth", {"0.threshold": torch.tensor(math.nan)}),
    ):
        torch.save(state, tmp_path / name)
        with pytest.raises(BadThresholds):
            Thresholds.load(tmp_path / name)
    path.write_bytes(b"no zip")
    with pytest.raises(BadThresholds, match="cannot read"):
        Thresholds.load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_checkpoint_is_read_or_refused(tmp_path, zipped, recwarn):
    path, chance = tmp_path / "x-72out.pth", random.Random(0)
    state = {f"blocks.{layer}.threshold": torch.tensor(0.5) for layer in range(4)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), list[str]()
    for trial in range(100):
        data = bytearray(whole[: chance.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(4 * (trial % 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            assert len(Thresholds.load(path).calibrated[0].thresholds) == 4
        except BadThresholds as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all(str(path) in sentence and "\n" not in sentence for sentence in refused)
    path.write_bytes(b"")
    with pytest.raises(BadThresholds, match=r"x-72out\.pth"):
        Thresholds.load(path)
    assert not recwarn.list


@pytest.mark.parametrize("state", [[], torch.zeros(3), {"state_dict": None}, {}, {"x" * 5000: 1}, {"9" * 5000: 1}])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "x-72out.pth")
    with pytest.raises(BadThresholds, match=r"x-72out\.pth"):
        Thresholds.load(tmp_path / "x-72out.pth")


def test_names_that_are_no_utf8_are_saved_as_escapes(tmp_path):
    thresholds(model="m\udcff", skipped=({"image": "b\udcff.png", "why": "is empty"},)).save(tmp_path / "t.json")
    loaded = Thresholds.load(tmp_path / "t.json")
    assert loaded.skipped == ({"image": r"b\udcff.png", "why": "is empty"},)
    assert loaded.model == r"m\udcff"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to("pipe.json")
    (tmp_path / "null.json").symlink_to(os.devnull)
    for name in ("pipe.json", "link.json", "null.json"):
        with pytest.raises(BadOutput, match=rf"{name} is no ordinary file but a device, a pipe or a socket: name a fi"):
            thresholds().save(tmp_path / name)
    assert (tmp_path / "pipe.json").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link.json", "null.json", "pipe.json"]
    with pytest.raises(BadOutput, match=r"is a folder: name a file"):
        thresholds().save(tmp_path)
    with pytest.raises(BadOutput, match=r"x+….*cannot be written \(File name too long\): give it a shorter name"):
        thresholds().save(tmp_path / ("x" * 300 + ".json"))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "t.json"
    path.touch()
    path.chmod(mode)
    thresholds().save(path)
    assert path.stat().st_mode & 0o777 == mode
    assert Thresholds.load(path) == thresholds()


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(BadThresholds, match="no ordinary file"):
            Thresholds.load(path)
