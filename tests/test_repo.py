"""What a user of the package meets before the first model: light imports, names, versions."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import dymu

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "PIL")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["dymu", "dymu.cli", "dymu.errors"])
def test_importing_is_light(module):
    heavy = run_python(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])")
    assert heavy == "[]"


def test_importing_the_library_imports_no_model_code():
    loaded = run_python(
        "import sys, dymu; dymu.apply, dymu.Thresholds; "
        "print([m for m in sys.modules if m.startswith('transformers.models.') "
        "and '.modeling_' in m])"
    )
    assert loaded == "[]"


def test_apply_is_the_function_whatever_was_imported_first():
    orders = [
        "import dymu; first = dymu.apply; import dymu.apply",
        "import dymu.apply; import dymu; first = dymu.apply",
        "from dymu.apply import Handle; import dymu; first = dymu.apply",
        "from dymu import apply as first; from dymu.apply import Handle; import dymu",
        "import dymu.apply as first; import dymu",
        "import dymu; dymu.Handle; first = dymu.apply",
    ]
    # One process, since torch is slow to import; dymu itself is imported anew for each order.
    answers = run_python(f"""
import sys
for order in {orders}:
    for name in [name for name in sys.modules if name.split(".")[0] == "dymu"]:
        del sys.modules[name]
    names = {{}}
    exec(order, names)
    print(names["first"] is names["dymu"].apply, type(names["first"]).__name__)
""")
    assert answers.splitlines() == ["True function"] * len(orders)


@pytest.mark.parametrize("name", dymu.__all__)
def test_every_name_that_is_offered_is_there(name):
    assert getattr(dymu, name) is not None
    assert name in dir(dymu)


def test_a_name_that_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = dymu.nothing_like_it


def test_versions_agree():
    assert metadata.version("dymu") == dymu.__version__


def test_every_dependency_is_pinned_within_its_range():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    names = {name.lower().replace("_", "-") for name in pins}
    needed = {
        re.match(r"[\w.-]+", requirement)[0].lower()
        for requirement in metadata.requires("dymu")
        if "extra ==" not in requirement or "dev" in requirement
    }
    assert needed <= names
    assert not any("+" in version for version in pins.values())
