"""All commands by name, and the one place for errors and exit codes.

A command is a module of this package with ``parser()``, its arguments, and ``run(args)``, which returns the exit code. Only
``run`` may import torch: ``--help`` is instant, and ``run`` first sets the environment variables that torch reads when it is
imported. ``RESUME`` says what to do after an interruption.

Exit codes: 0 success, 1 a bug or no memory, 2 bad input, or a file or disk that fails, 130 interrupted, 141 closed pipe;
``train`` adds 128 + signal.
"""

import argparse
import contextlib
import importlib
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from moda import __version__
from moda.errors import UserError, nearest

from ._missing import missing

__all__ = ["COMMANDS", "arguments", "main", "script"]

COMMANDS = {
    "train": "train a model, or resume its run",
    "plan": "print a run's configuration, sizes, FLOPs, memory and steps",
    "sweep": "train every run of an ablation sweep",
    "eval": "perplexity and downstream accuracy of checkpoints",
    "compare": "compare two evaluations, with intervals",
    "report": "tables and charts of runs: losses, speedups, seeds",
    "generate": "continue a text with a checkpoint",
    "export": "write a checkpoint as a Hugging Face folder, or read one back",
    "choose": "end a warm-up with scores of slots: keep the best and go on with them",
    "prepare": "turn text into token files, mirror a data mix, inspect prepared data",
    "bench": "measure kernels, training, evaluation and data preparation",
    "visualize": "show what checkpoints attend to, over the sequence and over depth",
    "draw": "draw what a query of a MoDA layer sees, or what layers read",
}

NO_BUGS = {
    "MemoryError": "out of memory",
    "OutOfMemoryError": "out of GPU memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """``moda COMMAND ...``; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        return _execute(given[0], given[1:])
    parser = _all_commands(whole=any(word.startswith("--print-completion") for word in given))
    parser.parse_args(given)
    parser.print_help(sys.stderr)
    return 2


def script(command: str, *others: str) -> Callable[..., int]:
    """The ``main(argv=None)`` of a script: runs ``command``, or one of ``others`` if the first argument names it."""

    def script_main(argv: Sequence[str] | None = None) -> int:
        given = list(sys.argv[1:] if argv is None else argv)
        name = f"python {sys.argv[0]}"
        if given and given[0] in others:
            return _execute(given[0], given[1:], f"{name} {given[0]}")
        return _execute(command, given, name)

    return script_main


def arguments(command: str, argv: Sequence[str], name: str | None = None) -> argparse.Namespace:
    """Parse a command's arguments; ``key=value`` overrides may stand among its options.

    :param name: how the user called the command, for its help; ``moda COMMAND`` by default.

    :raises SystemExit: 2 for arguments that it does not accept, after printing the usage.
    """
    parser = _rename(importlib.import_module(f"moda_cli.{command}").parser(), name or f"moda {command}")
    return parser.parse_args(argv) if _children(parser) else parser.parse_intermixed_args(argv)


def _children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(groups[0]) if groups else {}


def _rename(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    parser.prog = name
    for choice, child in _children(parser).items():
        _rename(child, f"{name} {choice}")
    return parser


def _execute(command: str, argv: Sequence[str], name: str | None = None) -> int:
    """Run a command. One of several ranks that fails ends at once: at its exit NCCL may wait for the others, and they for it."""
    code = _run(command, argv, name)
    torch = sys.modules.get("torch")
    if code and torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(command: str, argv: Sequence[str], name: str | None) -> int:
    """Run a command and turn what it raises into a message and an exit code."""
    first = os.environ.get("RANK", "0") == "0"  # bad input and an interruption reach every process: one speaks
    try:
        if command not in COMMANDS:
            raise UserError("command", "one that exists", command, nearest(command, COMMANDS))
        for word in argv:
            _check_word(word)
        args = arguments(command, argv, name)
        return importlib.import_module(f"moda_cli.{command}").run(args)
    except UserError as e:
        if first or e.every_rank:
            print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = getattr(sys.modules.get(f"moda_cli.{command}"), "RESUME", "the same command starts again")
        if first:
            print(f"interrupted: {resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `moda plan ... | head`; nothing more can be printed, not even when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit:
        raise
    except BaseException as e:  # torch's CheckpointException is no Exception; any process may fail, so each speaks
        return _report(e)


def _check_word(word: str) -> None:
    """Refuse what no file name or text can hold, before anything stumbles over it.

    And ``--option=--``, of which argparse makes an empty list.
    """
    if re.fullmatch(r"--?[\w-]+=--", word):
        raise UserError("argument", "a value after the equals sign", word)
    with contextlib.suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(word):
            return
    raise UserError("argument", "valid text without NUL characters", repr(word))


def _failed_file(error: BaseException | None) -> OSError | None:
    """The error of a file or disk that an error was raised for, through however many layers."""
    seen: list[BaseException | None] = [None]
    while error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            return error
        for inner, _ in getattr(error, "failures", {}).values():  # torch's CheckpointException, by rank
            if (found := _failed_file(inner)) is not None:
                return found
        assert error is not None
        error = error.__cause__ or error.__context__
    return None


def _report(error: BaseException) -> int:
    """One line about an unexpected error; the traceback goes to the run's log, or to a file if the process has none.

    :returns: the exit code: 2 where a file or disk failed, which is no bug.
    """
    if isinstance(error, ModuleNotFoundError) and not (error.name or "moda").startswith("moda"):
        print(missing(error), file=sys.stderr)
        return 1
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    logs = [h for h in files if h.baseFilename != os.devnull]
    failed = _failed_file(error)
    where = ""
    if os.environ.get("MODA_TRACEBACK", "0") != "0":
        print(trace, end="", file=sys.stderr)
        where = "above"
    elif logs:
        logs[0].handle(logging.LogRecord("moda", logging.ERROR, __file__, 0, trace, None, None))
        where = logs[0].baseFilename
    elif failed is None:
        with tempfile.NamedTemporaryFile("w", prefix="moda-", suffix=".log", delete=False) as f:
            f.write(trace)
        where = f"{f.name}, or set MODA_TRACEBACK=1"
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    if failed is not None:
        name = os.fsdecode(failed.filename) if isinstance(failed.filename, (str, bytes)) else "file or disk"
        what = str(UserError(name + rank, "a file, folder or disk that can be used", failed.strerror))
    else:
        reason = (str(error).strip() or "no message").splitlines()[0][:500]
        what = f"{NO_BUGS.get(type(error).__name__, 'this is a bug')}{rank}: {type(error).__name__}: {reason}"
    print(f"error: {what}" + (f" (traceback: {where})" if where else ""), file=sys.stderr)
    return 1 if failed is None else 2


def _all_commands(whole: bool) -> argparse.ArgumentParser:
    """The parser of ``moda`` itself; ``whole``: with the arguments of every command, for completion."""
    about = "Language models with Mixture-of-Depths Attention. `moda COMMAND --help` describes a command."
    more = "Several processes: torchrun --nproc-per-node=8 -m moda_cli COMMAND ..."
    parser = argparse.ArgumentParser("moda", description=about, epilog=more)
    parser.add_argument("--version", action="version", version=f"moda {__version__}")
    children = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        parents = [importlib.import_module(f"moda_cli.{name}").parser()] if whole else []
        children.add_parser(name, help=text, parents=parents, add_help=not whole)
    try:
        import shtab
    except ImportError:
        if whole:
            parser.error("--print-completion needs the package shtab: pip install -e '.[completion]'")
    else:
        shtab.add_argument_to(parser, "--print-completion")
        _complete_files(parser, shtab.FILE)
    return parser


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    """Arguments without a list of choices complete to file names."""
    for action in parser._actions:
        if not action.choices and action.nargs != 0:
            action.complete = how  # type: ignore[attr-defined]
    for child in _children(parser).values():
        _complete_files(child, how)
