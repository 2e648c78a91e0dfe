"""What the parsers of several commands share."""

import argparse
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["Help", "add_config_arguments", "add_model_options", "count", "from_arguments", "new_parser"]

T = TypeVar("T")


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples, and shows defaults that are not empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default in ([], argparse.SUPPRESS) or action.default is None or action.default is False
        return action.help if hidden or not action.help else f"{action.help} (default: %(default)s)"


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser described by a module's docstring; what follows ``Examples:`` ends its help (``%(prog)s``: the command)."""
    about, _, examples = (text or "").partition("\nExamples:\n")
    epilog = f"examples:\n{examples}" if examples else None
    return argparse.ArgumentParser(description=about, epilog=epilog, formatter_class=Help)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration file and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/moda_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key: optim.lr=1e-3")


def add_model_options(parser: argparse.ArgumentParser, dtypes: list[str]) -> None:
    """How a checkpoint is loaded."""
    group = parser.add_argument_group("loading the model")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    group.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, else float32")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, if the checkpoint's own cannot be reached")
    group.add_argument(
        "--context-length", type=int, metavar="N", help="allow N tokens instead of what the model was trained on"
    )


def count(text: str) -> int:
    """A number of tokens, such as ``400e9``."""
    return int(float(text))


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return int(text)


def from_arguments(kind: type[T], args: argparse.Namespace, **changes: Any) -> T:
    """A dataclass whose fields are arguments of the same names; ``changes`` come first."""
    given = {**vars(args), **changes}
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})  # type: ignore[arg-type]
