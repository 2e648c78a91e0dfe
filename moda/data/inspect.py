"""A look at token files: how many documents and how long, a few of them decoded, and the sources' shares."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from moda.config.schema import TokenizerSection
from moda.errors import UserError

from .manifest import MANIFEST, find_manifest, read_manifest
from .sources.base import stem
from .token_files import token_dtype
from .tokenizer import Tokenizer, load_tokenizer

_BLOCK = 1 << 24  # token ids read at a time
_BUCKETS = 32  # powers of two
_BAR = 40


@dataclass
class Lengths:
    """Documents of one source: how many, and a histogram of their lengths in tokens (eos included) by powers of two.

    Bucket b holds documents of 2^(b-1)+1 to 2^b tokens.
    """

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    buckets: np.ndarray = field(default_factory=lambda: np.zeros(_BUCKETS, dtype=np.int64))
    unfinished: int = 0  # tokens after the last eos of a file

    def add(self, lengths: np.ndarray) -> None:
        if len(lengths):
            self.documents += len(lengths)
            self.longest = max(self.longest, int(lengths.max()))
            self.buckets += np.bincount(np.ceil(np.log2(lengths)).astype(int), minlength=_BUCKETS)

    def quantile(self, q: float) -> int:
        """An upper bound of the q-quantile: the end of its bucket."""
        if not self.documents:
            return 0
        return 2 ** int(np.searchsorted(np.cumsum(self.buckets), q * self.documents))


def scan(path: Path, dtype: Any, eos: int, lengths: Lengths) -> None:
    """Add the documents of a token file, read a block at a time.

    :raises UserError: for a file that is empty or holds no whole token ids.
    """
    start = position = 0  # of the current document, and of the block
    try:
        tokens = np.memmap(path, dtype=dtype, mode="r")
    except ValueError:
        raise UserError(
            "folder", f"whole {np.dtype(dtype)} token ids in {path}", f"{path.stat().st_size} bytes"
        ) from None
    while position < len(tokens):
        block = np.asarray(tokens[position : position + _BLOCK])
        ends = np.flatnonzero(block == eos) + position + 1
        if len(ends):
            lengths.add(np.diff(ends, prepend=start))
            start = int(ends[-1])
        position += len(block)
    lengths.tokens += len(tokens)
    lengths.unfinished += len(tokens) - start


def histogram_lines(lengths: Lengths) -> Iterator[str]:
    """The histogram as text, a line per bucket."""
    used = np.flatnonzero(lengths.buckets)
    if not len(used):
        return
    most = int(lengths.buckets.max())
    for b in range(int(used[0]), int(used[-1]) + 1):
        n = int(lengths.buckets[b])
        low = 1 if b == 0 else 2 ** (b - 1) + 1
        bar = "#" * max(round(_BAR * n / most), 1 if n else 0)
        yield f"{low:>11,} - {2**b:<11,} {n:>12,}  {bar}"


def plot_histogram(sources: dict[str, Lengths], path: str) -> None:
    """Draw the histograms of the training sources as shares of their documents.

    :raises UserError: for a file that cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shown = {n: lengths for n, lengths in sources.items() if not n.endswith("(validation)")} or sources
    edges = 2.0 ** np.arange(_BUCKETS)
    for name, lengths in shown.items():
        if lengths.documents:
            used = np.flatnonzero(lengths.buckets)
            some = slice(max(int(used[0]) - 1, 0), int(used[-1]) + 2)
            share, label = lengths.buckets / lengths.documents, f"{name} ({lengths.documents:,} documents)"
            axis.plot(edges[some], share[some], marker="o", ms=4, label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="tokens in a document (up to)", ylabel="share of the source's documents")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise UserError("--plot", "a file that can be written, .png, .svg or .pdf", path, str(e)) from None
    finally:
        plt.close(figure)


def _sample(path: Path, dtype: Any, eos: int, rng: random.Random, longest: int = 400) -> list[int]:
    """The beginning of some document of a file: the first one after a random place."""
    tokens = np.memmap(path, dtype=dtype, mode="r")
    place = rng.randrange(len(tokens))
    window = np.asarray(tokens[place : place + (1 << 20)])
    ends = np.flatnonzero(window[:-1] == eos)
    start = place + int(ends[0]) + 1 if len(ends) else 0
    document = np.asarray(tokens[start : start + longest])
    ends = np.flatnonzero(document == eos)
    return document[: int(ends[0]) if len(ends) else None].tolist()


def _find(paths: Sequence[str], given: str | None) -> tuple[dict[str, list[Path]], Tokenizer]:
    """Token files by source (validation apart), and the tokenizer that made them."""
    files: dict[str, list[Path]] = {}
    section: TokenizerSection | None = None if given is None else TokenizerSection(given)
    made_by = set()
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise UserError("folder", "a prepared folder or a token file", name)
        file = path / MANIFEST if path.is_dir() else find_manifest(path)
        if path.is_dir() and not (path / MANIFEST).is_file():
            hint = "give token files themselves, with --tokenizer"
            raise UserError("folder", f"a prepared folder, with {MANIFEST}", name, hint)
        manifest = {} if file is None else read_manifest(file)
        try:
            for shard, entry in manifest["shards"].items() if path.is_dir() else ():
                label = entry["source"] + ("" if entry["split"] == "train" else f" ({entry['split']})")
                files.setdefault(label, []).append(path / shard)
            if t := manifest.get("tokenizer"):
                made_by.add(t["fingerprint"])
                section = section or TokenizerSection(t["name"], t["vocab_size"], t["eos_token_id"], t["pad_token_id"])
        except KeyError as e:
            raise UserError("manifest", f"the entry {e} in {file}", hint="prepare the data again") from None
        if path.is_file():
            files.setdefault(stem(name), []).append(path)
    if len(made_by) > 1:
        raise UserError("folder", "data that one tokenizer made", f"{len(made_by)} tokenizers")
    if section is None:
        raise UserError("--tokenizer", "the tokenizer of these token files, which have no manifest")
    try:
        return files, load_tokenizer(section)
    except UserError as e:
        raise UserError("--tokenizer", "the tokenizer of these token files", hint=str(e)) from None


def inspect(
    paths: Sequence[str], console: Console, *, samples: int = 3, plot: str | None = None, tokenizer: str | None = None,
    seed: int = 0,
) -> dict[str, Lengths]:  # fmt: skip
    """Print documents, length histogram, samples and shares of prepared data.

    :param paths: prepared folders or token files.
    :param samples: documents to decode from each source.
    :param plot: a file for the histogram as a picture.
    :param tokenizer: to decode with, where the manifest's file is not found.

    :raises UserError: for files that are missing or whose tokenizer is not known.
    """
    files, made_with = _find(paths, tokenizer)
    eos, dtype = made_with.config.eos_token_id, token_dtype(made_with.config.vocab_size)
    sources: dict[str, Lengths] = {}
    for name, shards in files.items():
        lengths = sources[name] = Lengths()
        for shard in shards:
            if not shard.is_file():
                raise UserError("folder", f"the shard {shard}, which the manifest lists")
            scan(shard, dtype, eos, lengths)
    total = sum(lengths.tokens for lengths in sources.values())
    table = Table(title=f"{made_with.name}, {dtype}, eos {eos}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("source", "files", "documents", "tokens", "share", "mean", "longest"):
        table.add_column(heading, justify="left" if heading == "source" else "right", overflow="fold")
    for name, n in sources.items():
        mean = f"{n.tokens / n.documents:,.0f}" if n.documents else "-"
        figures = (f"{n.documents:,}", f"{n.tokens:,}", f"{n.tokens / max(total, 1):.2%}", mean, f"{n.longest:,}")
        table.add_row(name, f"{len(files[name]):,}", *figures)
    console.print(table)
    for name, lengths in sources.items():
        size = decimal(sum(shard.stat().st_size for shard in files[name]))
        half = f"{lengths.quantile(0.5):,}"
        console.print(f"{name} ({size}): documents by tokens, half have up to {half}", highlight=False, markup=False)
        for line in histogram_lines(lengths):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if lengths.unfinished:
            console.print(f"{lengths.unfinished:,} tokens after the last document end", highlight=False)
        console.print()
    if samples:
        _show_samples(files, made_with, dtype, samples, seed, console)
    if plot is not None:
        plot_histogram(sources, plot)
        console.print(f"\nhistogram: {plot}", highlight=False, soft_wrap=True)
    return sources


def _show_samples(
    files: dict[str, list[Path]], made_with: Tokenizer, dtype: Any, samples: int, seed: int, console: Console
) -> None:
    encoder, rng = made_with.load(), random.Random(seed)
    for name, shards in files.items():
        for number in range(samples):
            shard = rng.choices(shards, weights=[max(s.stat().st_size, 1) for s in shards])[0]
            ids = _sample(shard, dtype, made_with.config.eos_token_id, rng)
            text = encoder.decode(ids, skip_special_tokens=False)
            console.print(f"\n--- {name}, sample {number + 1}, from {shard.name} ---", highlight=False, markup=False)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
