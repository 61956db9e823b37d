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


@pytest.mark.parametrize("module", ["dymu", "dymu.cli.main", "dymu.errors", "dymu.evaluation.methods"])
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


def test_the_two_halves_know_torch_alone():
    """What vLLM, timm and workers use of the library needs no transformers."""
    known = run_python(
        "import dymu.merging, dymu.unmerging, dymu.reducers, sys; "
        "print('transformers' in sys.modules, 'PIL' in sys.modules)"
    )
    assert known == "False False"


def test_no_public_name_is_also_a_modules():
    modules = {path.stem for path in (ROOT / "src" / "dymu").iterdir()}
    assert modules.isdisjoint(set(dymu.__all__))


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


def test_the_demos_recipe_says_what_it_needs():
    code = "import sys; sys.modules['onnx'] = None; import training.heldout"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert "training/requirements.txt" in sentence


def test_the_readmes_python_runs_as_it_stands(monkeypatch, capsys):
    """On the demo model and the example photo, in a clone's root."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {})
    answer, merged = capsys.readouterr().out.strip().splitlines()
    kept, saved = re.fullmatch(r"\[(\d+)\] (\d+)", merged).groups()
    assert answer.startswith("what is this?")
    assert 0 < int(kept) < 256
    assert int(saved) > 0
