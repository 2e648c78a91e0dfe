"""Which package may import which: one way only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"moda_kernels", "moda", "moda_evals", "moda_cli", "scripts", "kernels", "evals"}  # the last two belong to others
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
