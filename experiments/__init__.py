"""Finished studies: each script answers one question, and its page and result file stand beside it.

They run with the library as it is; nothing in the library or in `benchmarks` needs them but the tables of their pages.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
