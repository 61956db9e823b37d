"""The page in a real browser, in an environment that has Gradio and Playwright (`make test-page`)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if find_spec("playwright") and find_spec("gradio") else ["test_*.py"]

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where `dymu demo` serves the demo model."""
    code = "from dymu.cli.main import main; main()"
    results = ROOT / "training" / "results" / "heldout.jsonl"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--port", "0", "--results", str(results)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT,
    )  # fmt: skip
    said = []
    assert server.stderr is not None
    try:
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"the page is at (http://\S+);", line):
                yield found[1]
                break
        else:
            pytest.fail(f"dymu demo ended: {''.join(said)}")
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("these tests need Debian's chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()
