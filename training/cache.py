"""Where downloads, unpacked assets, features and checkpoints live: never in git."""

import os
from pathlib import Path


def cache_root(of: str = "training") -> Path:
    """The cache directory; ``DYMU_CACHE`` moves it."""
    root = Path(os.environ.get("DYMU_CACHE", Path.home() / ".cache" / "dymu")) / of
    root.mkdir(parents=True, exist_ok=True)
    return root
