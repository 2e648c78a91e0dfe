"""The Python files of an exported folder: the modelling code and all that it imports of this project, side by side.

transformers loads remote code from one flat folder. So each module is copied under the last part of its name, and its imports
of this project's modules become relative ones (``from moda.depth.moda import MoDA`` becomes ``from .moda import MoDA``).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["bundle"]

_ENTRY = "moda.hf.modeling_moda"
_OWN = ("moda", "moda_kernels")


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module of this project that a module imports names from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if name.split(".")[0] in _OWN:
                yield node.lineno, name


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def bundle() -> dict[str, str]:
    """The files by name, with their contents."""
    files: dict[str, str] = {}
    modules, waiting = {_ENTRY}, [_ENTRY]
    while waiting:
        module = waiting.pop()
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        text = Path(spec.origin).read_text(encoding="utf-8")
        package = module if spec.submodule_search_locations else module.rpartition(".")[0]
        lines = text.splitlines()
        for number, name in _imports(ast.parse(text), package):
            lines[number - 1] = re.sub(r"from\s+\S+\s+import", f"from .{_last(name)} import", lines[number - 1])
            if name not in modules:
                modules.add(name)
                waiting.append(name)
        file = f"{_last(module)}.py"
        assert file not in files, f"two modules of an export are called {file}"
        files[file] = "\n".join(lines) + "\n"
    return files
