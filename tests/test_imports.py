"""Which package may import which: one way only."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moda
from tests.tiny import ROOT, environment

OURS = {
    "moda_kernels",
    "moda",
    "moda_evals",
    "moda_cli",
    "scripts",
    "kernels",
    "evals",
}  # the last two belong to others
MAY_IMPORT = {
    "kernels": {"moda_kernels"},
    "moda": {"moda_kernels", "moda"},
    "evals": {"moda_kernels", "moda", "moda_evals"},
    "scripts": {"moda_kernels", "moda", "moda_evals", "moda_cli"},
}
FILES = [p for package in MAY_IMPORT for p in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def test_every_package_that_is_imported_is_asked_for() -> None:
    """In ``pyproject.toml``, by name; PyTorch's wheel brings Triton, and who wants Ray knows it."""
    asked = set(re.findall(r'"([\w-]+)[\[<>=;"]', (ROOT / "pyproject.toml").read_text()))
    names = set().union(*(imported(path) for path in FILES)) - OURS - sys.stdlib_module_names
    called = {"yaml": "pyyaml", "olmo_core": "ai2-olmo-core", "olmo_eval": "ai2-olmo-eval", "": "torch"}
    known = {called.get(name, name.replace("_", "-")) for name in names}
    assert len(known) > 15 and known - asked <= {"ray"}, known - asked


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_import_downwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert not (names & OURS) - MAY_IMPORT[package]
    if package == "kernels":
        third_party = names - set(sys.stdlib_module_names) - {"moda_kernels"}
        assert third_party <= {"torch", "triton", "flash_attn", "flash_attn_interface", "matplotlib", "rich"}


def test_kernels_import_without_triton() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
import torch, moda_kernels
q = torch.randn(1, 3, 2, 8)
assert moda_kernels.moda_attention(q, q, q, backend="reference").shape == q.shape
assert not hasattr(moda_kernels, "__version__")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_importing_kernels_loads_neither_triton_nor_olmo_core() -> None:
    code = (
        "import sys, moda_kernels; assert not {'triton', 'olmo_core', 'moda'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_one_version() -> None:
    """The operator alone and the whole project are released together."""
    alone = re.search(r'^version = "(.*)"', (ROOT / "kernels" / "pyproject.toml").read_text(), re.MULTILINE)
    citation = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert alone is not None and citation is not None
    assert alone[1] == citation[1] == moda.__version__
    assert f"## [{moda.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_kernels_package_of_hugging_face_beside_ours(tmp_path: Path) -> None:
    """transformers uses a package called ``kernels``: with it installed, its classes and ours can be imported."""
    hub_kernels = pytest.importorskip("transformers.integrations.hub_kernels")
    wanted = f"kernels>={hub_kernels.KERNELS_MIN_VERSION},<{hub_kernels.KERNELS_MAX_VERSION}"
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    installed = subprocess.run([*line, wanted, "kernels-data"], capture_output=True, text=True)
    if installed.returncode:
        assert "Could not find a version" in installed.stderr or "No module named pip" in installed.stderr
        pytest.skip("the package index cannot be reached")
    code = f"""
import kernels, moda, moda_cli, moda_evals.run, moda_kernels
from transformers.utils import is_kernels_available
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Olmo2ForCausalLM
assert kernels.__file__.startswith({str(tmp_path)!r}) and is_kernels_available()
"""
    clone = environment()
    clone["PYTHONPATH"] = os.pathsep.join([clone["PYTHONPATH"], str(tmp_path)])  # the clone comes first, as in its root
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=clone)
