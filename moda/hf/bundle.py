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

from moda.errors import UserError

__all__ = ["bundle"]

_ENTRY = "moda.hf.modeling_moda"
_OWN = ("moda", "moda_kernels")


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module of this project that a module imports names from.

    :raises UserError: for an import of a whole module, which cannot be rewritten.
    """
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] in _OWN]
        else:
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            if name.split(".")[0] in _OWN:
                modules = [m for alias in node.names if _is_module(m := f"{name}.{alias.name}")]
                yield node.lineno, name
        if modules:
            expected = f"from MODULE import NAME in a file that is exported (line {node.lineno}, in {package})"
            raise UserError("export", expected, f"the whole module {modules[0]}")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a name inside a module that is no package
        return False


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def bundle() -> dict[str, str]:
    """The files by name, with their contents.

    :raises UserError: for an import that cannot be rewritten, or two files of one name.
    """
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
        if file in files:
            raise UserError(
                "export", "files of different names", f"two that are called {file}", f"rename {spec.origin}"
            )
        files[file] = "\n".join(lines) + "\n"
    return files
