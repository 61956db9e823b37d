"""Build what scenes are composed from: the evaluation pack, which is committed, and the training pack, which is not.

Which identity goes where stands in ``lists/``: objects by name, photos by subject, backgrounds and fonts one by one.

    python -m training.pack                 both packs
    python -m training.pack --only training
"""

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import cairosvg
from fontTools import subset, ttLib
from PIL import Image

import scenes.assets as materials
from training.assets import DEBIAN, debian_folder, emoji_folder, photos_folder
from training.cache import cache_root

LISTS = Path(__file__).with_name("lists")
EVALUATION = Path(materials.__file__).with_name("pack")

SPRITE_SIDE = {"evaluation": 144, "training": 224}
PHOTO_SIDE = {"evaluation": 448, "training": 640}
BACKGROUND_SIDE = {"evaluation": 400, "training": 800}
SPRITE_QUALITY, PHOTO_QUALITY, BACKGROUND_QUALITY = 80, 72, 60
EFFORT = {"evaluation": 6, "training": 1}
"""Of WebP: what is committed is worth minutes of packing, what is not is not."""
WORDS = {"evaluation": 3000, "training": 12000}
HELD_OUT_WORDS = 0.25
"""Part of the words that only the evaluation shows."""

USES = {"evaluation": ("heldout", "calibration"), "training": ("training",)}
PHOTO_USES = {"evaluation": ("heldout", "heldout-known"), "training": ("train",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("evaluation", "training"))
    only = parser.parse_args().only
    for pack, folder in (("evaluation", EVALUATION), ("training", training_folder())):
        if only in (None, pack):
            build(pack, folder)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            print(f"{pack}: {folder} holds {size / 1e6:.2f} MB")


def training_folder() -> Path:
    """Where the training pack lies."""
    return cache_root() / "scenes-pack"


def rows(name: str) -> list[dict[str, str]]:
    """A list of identities, as its CSV file has it."""
    with (LISTS / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def build(pack: str, folder: Path) -> None:
    """Write one pack; a folder that exists is replaced once the new one is complete."""
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    index = {
        "format": materials.FORMAT,
        "things": list(_things(pack, scratch)),
        "photos": list(_photos(pack, scratch)),
        "backgrounds": list(_backgrounds(pack, scratch)),
        "fonts": list(_fonts(pack, scratch)),
    }
    (scratch / "words.txt").write_text("\n".join(_words(pack)) + "\n", encoding="utf-8")
    files = sorted(file for file in scratch.rglob("*") if file.is_file())
    index["sha256"] = {str(file.relative_to(scratch)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (scratch / "pack.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if pack == "evaluation":
        (scratch / "CREDITS.md").write_text(_credits(), encoding="utf-8")
        shutil.copytree(LISTS / "licences", scratch / "LICENSES")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _things(pack: str, folder: Path) -> Iterator[dict[str, object]]:
    (folder / "things").mkdir()
    clipart = debian_folder("openclipart-svg") / "usr" / "share" / "openclipart" / "svg"
    for row in rows("objects"):
        known = row["split"] == "known"
        if pack == "training" and not known:
            continue
        pictures: list[Image.Image] = []
        for code in row["emoji"].split():
            with Image.open(emoji_folder() / f"{code}.webp") as picture:
                pictures.append(picture.convert("RGBA"))
        pictures += [_drawn(clipart / file) for file in row["clipart"].split()]
        if pack == "evaluation":
            pictures = pictures[: 1 if known else 2]
        files = []
        for number, picture in enumerate(pictures):
            file = f"things/{_slug(row['name'])}-{number}.webp"
            _save(_trimmed(picture), folder / file, SPRITE_SIDE[pack], SPRITE_QUALITY, EFFORT[pack])
            files.append(file)
        yield {
            "name": row["name"],
            "plural": row["plural"],
            "also": _parts(row["also"]),
            "known": known,
            "outdoor": row["outdoor"] == "yes",
            "similar": _parts(row["similar"]),
            "files": files,
        }


def _photos(pack: str, folder: Path) -> Iterator[dict[str, object]]:
    (folder / "photos").mkdir()
    listed = rows("photos")
    taught = {row["name"] for row in listed if row["use"] == "train"}
    taught |= {row["name"] for row in rows("objects") if row["split"] == "known"}
    for row in listed:
        if row["use"] not in PHOTO_USES[pack]:
            continue
        yield {
            "file": _photo(row, folder, "photos", PHOTO_SIDE[pack], PHOTO_QUALITY, EFFORT[pack]),
            "name": row["name"],
            "subject": row["subject"],
            "unlike": _parts(row["unlike"]),
            "also": _parts(row["also"]),
            "known": row["name"] in taught,
            "description": row["description"],
        }


def _backgrounds(pack: str, folder: Path) -> Iterator[dict[str, object]]:
    (folder / "backgrounds").mkdir()
    for row in rows("photos"):
        use = {"background-train": "training"}.get(row["use"], row["use"].removeprefix("background-"))
        if row["name"] == "background" and use in USES[pack]:
            side = BACKGROUND_SIDE[pack]
            yield {"file": _photo(row, folder, "backgrounds", side, BACKGROUND_QUALITY, EFFORT[pack]), "use": use}


def _fonts(pack: str, folder: Path) -> Iterator[dict[str, object]]:
    (folder / "fonts").mkdir()
    for number, row in enumerate(rows("fonts")):
        if row["use"] not in USES[pack]:
            continue
        source = debian_folder(row["package"]) / "usr" / "share" / "fonts" / row["file"]
        file = f"fonts/{_slug(Path(row['file']).stem)}{source.suffix}"
        _subset(source, folder / file, f"Scenes {number}")
        yield {"file": file, "use": row["use"]}


def _subset(source: Path, target: Path, name: str) -> None:
    """Keep printable ASCII, under another name: a changed font must not bear a reserved one."""
    font = ttLib.TTFont(source, recalcTimestamp=False)
    options = subset.Options(
        hinting=False, layout_features=["kern"], name_IDs=[0, 1, 2, 4, 6, 13, 14], notdef_outline=True
    )
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=range(32, 127))
    subsetter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 4, 6):
            record.string = name.replace(" ", "") if record.nameID == 6 else name
    if "CFF " in font:
        table = font["CFF "].cff
        table.fontNames[0] = name.replace(" ", "")
        top = table.topDictIndex[0]
        top.FullName = top.FamilyName = name
    font.save(target)


def _words(pack: str) -> list[str]:
    """Lower-case words of three to eight letters; each belongs to one pack, by its hash."""
    text = (debian_folder("wamerican") / "usr" / "share" / "dict" / "american-english").read_text(encoding="utf-8")
    rude = set((LISTS / "rude.txt").read_text(encoding="utf-8").split())
    words = [word for word in text.split() if re.fullmatch("[a-z]{3,8}", word) and word not in rude]
    ranked = sorted(words, key=_hash)
    cut = round(HELD_OUT_WORDS * len(ranked))
    mine = ranked[:cut] if pack == "evaluation" else ranked[cut:]
    return sorted(mine[: WORDS[pack]])


def _photo(row: dict[str, str], folder: Path, kind: str, side: int, quality: int, effort: int) -> str:
    file = _photo_file(row, kind)
    with Image.open(photos_folder() / row["path"]) as picture:
        _save(picture.convert("RGB"), folder / file, side, quality, effort)
    return file


def _photo_file(row: dict[str, str], kind: str) -> str:
    return f"{kind}/{_slug(row['path'].removesuffix('.webp').replace('resource/', ''))}.webp"


def _drawn(file: Path) -> Image.Image:
    data = cairosvg.svg2png(url=str(file), output_width=320, output_height=320)
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _trimmed(picture: Image.Image) -> Image.Image:
    return picture.crop(picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())


def _save(picture: Image.Image, file: Path, side: int, quality: int, effort: int) -> None:
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(file, quality=quality, method=effort)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _parts(text: str) -> list[str]:
    return text.split("|") if text else []


def _hash(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def _credits() -> str:
    return "\n".join(_credit_lines()) + "\n"


def _credit_lines() -> Iterable[str]:
    yield "# Where the pictures, fonts and words of this folder come from"
    yield ""
    yield "Built by `python -m training.pack` from pinned packages; licence texts are in [LICENSES](LICENSES)."
    yield ""
    yield "| what | source | licence |"
    yield "| --- | --- | --- |"
    emoji = "Fluent Emoji, (c) Microsoft Corporation, by npm `@lobehub/fluent-emoji-3d@1.1.0`"
    yield f"| `things/`, rendered emoji | {emoji} | MIT |"
    yield f"| `things/`, clip art | Open Clip Art Library, by Debian `{_package('openclipart-svg')}` | Public Domain |"
    yield f"| `words.txt` | SCOWL, by Debian `{_package('wamerican')}` | as in LICENSES/scowl.txt |"
    for row in rows("fonts"):
        if row["use"] in USES["evaluation"]:
            name = _slug(Path(row["file"]).stem)
            source = f"Debian `{_package(row['package'])}`"
            yield f"| `fonts/{name}`, printable ASCII of {row['family']} | {source} | {row['licence']} |"
    yield "| `photos/`, `backgrounds/` | Debian `gcompris-qt-data=3.1-2`, scaled down | as below |"
    yield ""
    yield "## Clip art"
    yield ""
    for row in rows("objects"):
        shown = 1 if row["split"] == "known" else 2
        for file in row["clipart"].split()[: max(0, shown - len(row["emoji"].split()))]:
            yield f"* {row['name']}: `{file}`"
    yield ""
    yield "## Photos"
    yield ""
    yield "| file | licence | author | source |"
    yield "| --- | --- | --- | --- |"
    for row in rows("photos"):
        if row["use"] in (*PHOTO_USES["evaluation"], "background-heldout", "background-calibration"):
            file = _photo_file(row, "backgrounds" if row["name"] == "background" else "photos")
            yield f"| {file} | {row['licence']} | {row['author']} | <{row['source']}> |"


def _package(name: str) -> str:
    return "=".join(DEBIAN[name].command[-1].split("=", 1))


if __name__ == "__main__":
    main()
