"""What the parsers of several commands share."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, TypeVar

from moda.errors import UserError
from moda.ranges import Range
from moda.typed import Typed, convert

__all__ = [
    "Help",
    "add_config_arguments",
    "add_help_config",
    "add_model_options",
    "from_arguments",
    "new_parser",
]

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


class HelpConfig(argparse.Action):
    """``--help-config [KEY]``: print what is known of the keys of a command's configuration, and exit."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        from moda.config.reference import text

        print(text(self.dest, values))
        parser.exit()


def add_help_config(parser: argparse.ArgumentParser, command: str) -> None:
    """``--help-config``."""
    about = "describe all keys of the configuration, or KEY and those below it, and exit"
    options: dict[str, Any] = {"dest": command, "default": argparse.SUPPRESS, "const": ""}
    parser.add_argument("--help-config", nargs="?", metavar="KEY", action=HelpConfig, help=about, **options)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration file and overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/moda_demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key: optim.lr=1e-3")
    add_help_config(parser, "train")


def add_model_options(parser: argparse.ArgumentParser, dtypes: list[str]) -> None:
    """How a checkpoint is loaded."""
    group = parser.add_argument_group("loading the model")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    group.add_argument("--dtype", choices=dtypes, help="default: bfloat16 on a GPU, else float32")
    group.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, if the checkpoint's own cannot be reached")
    group.add_argument(
        "--context-length", type=number(Annotated[int, Range(1, 2**30)]), metavar="N",
        help="allow N tokens instead of what the model was trained on",
    )  # fmt: skip


def number(kind: Any) -> Callable[[str], Any]:
    """A type for argparse: a number with a range (:mod:`moda.ranges`), such as ``400e9``."""

    def read(text: str) -> Any:
        try:
            return convert(Typed(text), kind, "number")
        except UserError as e:
            raise argparse.ArgumentTypeError(str(e).removeprefix("number: ").replace("%", "%%")) from None

    return read


def from_arguments(kind: type[T], args: argparse.Namespace, **changes: Any) -> T:
    """A dataclass whose fields are arguments of the same names; ``changes`` come first."""
    given = {**vars(args), **changes}
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})  # type: ignore[arg-type]
