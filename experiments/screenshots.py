"""Screenshots of manuals, for calibrating and testing on what people show a model on their screens.

`screenshots(held_out=False)` are for calibration; those held out come from other manuals, in other fonts. Chromium
renders pages of Debian's documentation packages, offline: windows of four sizes, scrolled to different depths. The
packages and all fonts are pinned, and hashes choose page, window and depth: one version of Chromium always gives the
same pictures. `screens` also says where the words are. `python -m experiments.screenshots` renders all of them, in two
minutes.

Needs Debian's chromium, apt-get, dpkg-deb, the package playwright and 1.5 GB of disk.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from dymu.errors import DymuError
from dymu.files import whole_file
from training.assets import debian, debian_folder
from training.cache import cache_root

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--hide-scrollbars")  # fmt: skip
WINDOWS = ((1280, 800), (1440, 900), (390, 844), (1920, 1080))
"""Widths and heights, in pixels; the third is a phone's."""

LEAST_WORDS = 60
"""A screenshot that shows fewer is passed over: nearly empty pages and frames."""

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclass(frozen=True)
class Manual:
    """A documentation package of Debian 12, and which of its pages are rendered."""

    name: str
    version: str
    sha256: str
    pages: str
    """A glob, relative to usr/share."""

    def files(self) -> list[Path]:
        """Its pages but redirections, in an order that is as good as chance."""
        package = debian(self.name, self.version, self.sha256)
        root = debian_folder(self.name, package, cache_root("experiments") / "docs") / "usr" / "share"
        pages = [
            file
            for file in root.glob(self.pages)
            if not file.is_symlink() and b'http-equiv="refresh"' not in file.read_bytes().lower()
        ]
        return sorted(pages, key=lambda file: sha256(file.relative_to(root).as_posix().encode()).digest())


CALIBRATION = (
    Manual("apache2-doc", "2.4.68-1~deb12u1", "cee8fe80ffb5de2744cd690c3d795b489e43a1c44c4e3a634c521642f22d7835",
           "doc/apache2-doc/manual/en/**/*.html"),
    Manual("cmake-doc", "3.25.1-1", "6e805a758ffed87cc7ea234cf0a7a1bb8ae78b93d8b5783e7fb989a6320f8133",
           "doc/cmake-data/html/**/*.html"),
    Manual("debian-reference-en", "2.100", "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
           "debian-reference/*.html"),
    Manual("gimp-help-en", "2.10.34-2", "a2deec76763aaf2fcdd197bac0736cdcb0770ba993d48d233329e1c92b0bfe36",
           "gimp/2.0/help/en/*.html"),
    Manual("gnuplot-doc", "5.4.4+dfsg1-2", "73fe1816a296594cf6a1d38528f8d740fd650f57a2cb62e029f7920fcd5b31f0",
           "doc/gnuplot/htmldocs/*.html"),
    Manual("libsfml-doc", "2.5.1+dfsg-2", "dfc978bb65525fe0681ab1a7f600a725347b2c4d46d5258272536ed89f5bc72e",
           "doc/libsfml-dev/html/*.html"),
    Manual("rust-doc", "1.63.0+dfsg1-2", "96ef96fe6df87d939ca713bd7df3d15c2b778ccb892eca025c4ee504146f697b",
           "doc/rust-doc/html/[brs]*/**/*.html"),
    Manual("sqlite3-doc", "3.40.1-2+deb12u2", "466e30d7066e2641fa13e56bc662a2ad521b8cc9c17dde9c9dac3d4f105e32f2",
           "doc/sqlite3/**/*.html"),
)  # fmt: skip
HELD_OUT = (
    Manual("debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
           "doc/debian-handbook/html/en-US/*.html"),
    Manual("grass-doc", "8.2.1-1", "0f6da53d1f7d51b019dfe64bf45718b64022989afc94bb6c833f495aa2f61ff7",
           "doc/grass-doc/html/*.html"),
    Manual("kicad-doc-en", "6.0.11+dfsg-1", "20dbe9acb2e6f38d49bd742d4b71bee2dc3e7dbd8c54a7a45ad05a742e5ae834",
           "doc/kicad/help/en/*.html"),
    Manual("octave-doc", "7.3.0-2", "b27897cc7e3d688daa5cb8f8d1ea47077f3fbd205ce32e22522200ff0c1eadd5",
           "doc/octave/octave.html/*.html"),
    Manual("postgresql-doc-15", "15.18-0+deb12u1", "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0",
           "doc/postgresql-doc-15/html/*.html"),
    Manual("python-django-doc", "3:3.2.25-0+deb12u3",
           "33319c8e45b95693603213442ccf9bcee933ef338488115203ad25a0e01c696f", "doc/python-django-doc/html/**/*.html"),
    Manual("python-pandas-doc", "1.5.3+dfsg-2", "4998405ff6b12432f46594963e95554ade1104705795428396345fca58d853f8",
           "doc/python-pandas-doc/html/[uw]*/**/*.html"),
    Manual("qtbase5-doc-html", "5.15.8+dfsg-11+deb12u3",
           "e052497a7db970f002807e3543043c11e46135641b8284b0a419086ba64f5f47", "qt5/doc/*/*.html"),
)  # fmt: skip

FONTS = {
    False: (("Liberation Sans", "Liberation Serif", "Liberation Mono"), ("Roboto", "DejaVu Serif", "DejaVu Sans Mono")),
    True: (("Open Sans", "EB Garamond 12", "Hack"), ("Lato", "EB Garamond 12", "Inconsolata")),
}
"""What a page that asks for any sans serif, serif or fixed-width font gets: every second manual the second three."""

FONT_PACKAGES = {
    False: ("dejavu-core", "liberation", "roboto-unhinted"),
    True: ("ebgaramond", "hack", "inconsolata", "lato", "open-sans"),
}
FAMILIES = (
    ("sans-serif", "Arial", "Helvetica", "Verdana", "system-ui"),
    ("serif", "Times New Roman", "Times", "Georgia"),
    ("monospace", "Courier New", "Courier", "Menlo", "Consolas"),
)

SCROLL = """async depth => {
    await document.fonts.ready
    for (const e of [document.documentElement, ...document.querySelectorAll('*')])
        if (e.scrollHeight > e.clientHeight + 50) e.scrollTop = depth * (e.scrollHeight - e.clientHeight)
}"""
WORDS = r"""() => {
    const boxes = [], range = document.createRange()
    const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (nodes.nextNode()) {
        const text = nodes.currentNode, parent = text.parentElement, around = parent.getBoundingClientRect()
        if (around.bottom < 0 || around.top > innerHeight) continue
        for (const word of text.data.matchAll(/\S+/g)) {
            range.setStart(text, word.index)
            range.setEnd(text, word.index + word[0].length)
            for (const r of range.getClientRects()) {
                const seen = document.elementFromPoint((r.left + r.right) / 2, (r.top + r.bottom) / 2)
                if (seen && r.width && (seen.contains(parent) || parent.contains(seen)))
                    boxes.push([Math.max(r.left, 0), Math.max(r.top, 0), Math.min(r.right, innerWidth),
                                Math.min(r.bottom, innerHeight)])
            }
        }
    }
    return boxes
}"""


@dataclass(frozen=True)
class Screen:
    """A screenshot, and where its words are; words that are part of a picture on the page are not counted."""

    image: Image.Image
    words: list[Box]


def screenshots(held_out: bool, count: int = 200) -> list[Image.Image]:
    """The first `count` screenshots, in RGB, one of each manual in turn; rendered on first use.

    Raises:
        DymuError: Chromium or Playwright is not installed.
    """
    return [screen.image for screen in screens(held_out, count)]


def screens(held_out: bool, count: int = 200) -> list[Screen]:
    """The same, with their words.

    Raises:
        DymuError: Chromium or Playwright is not installed.
    """
    manuals = HELD_OUT if held_out else CALIBRATION
    folder = cache_root("experiments") / "screenshots" / ("held-out" if held_out else "calibration")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{manuals[k % len(manuals)].name}-{k // len(manuals):03}.png" for k in range(count)]
    shares = [(k, paths[k :: len(manuals)]) for k in range(len(manuals))]
    shares = [(k, share) for k, share in shares if not all(path.exists() for path in share)]
    with Progress(disable=not shares) as progress:
        bar = progress.add_task("screenshots", total=sum(len(share) for _, share in shares))
        for k, share in shares:
            _render(manuals[k], share, _fontconfig(held_out, k % 2), lambda: progress.advance(bar))
    return [_read(path) for path in paths]


def _read(path: Path) -> Screen:
    with Image.open(path) as image:
        return Screen(image.convert("RGB"), [tuple(box) for box in json.loads(path.with_suffix(".json").read_text())])


def _render(manual: Manual, paths: list[Path], fonts: Path, done: Callable[[], None]) -> None:
    """Render screenshots of a manual with the fonts of a configuration; `done` is called after each."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise DymuError("screenshots take Playwright: `pip install playwright`.") from error
    if not CHROMIUM.exists():
        raise DymuError(f"screenshots take Debian's Chromium as {CHROMIUM}: `apt-get install chromium`.")
    with sync_playwright() as driver:
        environment = {**os.environ, "FONTCONFIG_FILE": str(fonts)}
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, env=environment)
        page = browser.new_context(offline=True, color_scheme="light", locale="en-US").new_page()
        views = _views(page, manual.files())
        for path in paths:
            picture, words = next(views)
            path.with_suffix(".json").write_text(json.dumps(words))
            with whole_file(path) as partial:
                partial.write_bytes(picture)
            done()
        browser.close()


def _views(page: Any, files: list[Path]) -> Iterator[tuple[bytes, list[Box]]]:
    """Pictures (PNG) and words of page after page, in windows and at depths by hash; from the last on, the first again,
    elsewhere."""
    for number in itertools.count():
        file = files[number % len(files)]
        digest = sha256(f"{file.name} {number}".encode()).digest()
        width, height = WINDOWS[digest[0] % len(WINDOWS)]
        page.set_viewport_size({"width": width, "height": height})
        page.goto(file.as_uri())
        page.evaluate(SCROLL, max(0, digest[1] / 255 * 4 / 3 - 1 / 3))  # a quarter of them at the top
        words = page.evaluate(WORDS)
        if len(words) >= LEAST_WORDS:
            yield page.screenshot(animations="disabled"), words


def _fontconfig(held_out: bool, which: int) -> Path:
    """A file that lets Chromium see the pinned fonts of a half alone."""
    folders = [f"<dir>{debian_folder(f'fonts-{name}')}</dir>" for name in FONT_PACKAGES[held_out]]
    aliases = [
        f'<alias binding="same"><family>{family}</family><prefer><family>{font}</family></prefer></alias>'
        for font, families in zip(FONTS[held_out][which], FAMILIES, strict=True)
        for family in families
    ]
    cache = cache_root("experiments") / "fontconfig"
    cache.mkdir(exist_ok=True)
    path = cache / f"{'held-out' if held_out else 'calibration'}-{which}.conf"
    with whole_file(path) as partial:
        body = "".join([*folders, f"<cachedir>{cache}</cachedir>", *aliases])
        partial.write_text(f"<?xml version='1.0'?><fontconfig>{body}</fontconfig>", encoding="utf-8")
    return path


if __name__ == "__main__":
    for held_out in (False, True):
        print(len(screenshots(held_out)), "held out" if held_out else "for calibration")
