"""A local mirror of a data mix: downloaded in parallel, verified, resumed where it stopped.

A file is written beside its place as ``.<name>.part`` and moved there when it has the size that the server announced and, where
the server gives one, its MD5 (``Content-MD5``, or an ``ETag`` that is one, as S3's of files stored in one piece). A download that
stalls, breaks off or meets a server error is continued with a range request, up to a number of attempts.
"""

import base64
import errno
import http.client
import logging
import re
import shutil
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from olmo_core.io import is_url
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moda.config.schema import TokenizerSection
from moda.errors import UserError
from moda.files import read_json, write_json

from .manifest import hash_of
from .mixes import choose_subset, load_sizes, mix_paths, subset_file
from .token_files import token_dtype
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_FINAL = {400, 401, 403, 404, 410}  # HTTP errors that trying again does not mend
_SIZE_RETRIES = 3  # attempts at a file's size, so that an unreachable server is noticed soon

T = TypeVar("T")


@dataclass(frozen=True)
class MirrorOptions:
    """What to mirror.

    :param mix: a data mix of OLMo-core.
    :param folder: the mirror.
    :param source: base URL (http, https) or folder that has the mix.
    :param tokenizer: whose token files.
    :param tokens: a token budget, or None for the whole mix.
    :param seed: of the subset.
    :param connections: downloads at a time.
    :param timeout: seconds without a byte after which a download is begun again.
    :param retries: attempts per file; progress resets the count.
    """

    mix: str
    folder: str
    source: str
    tokenizer: str = "dolma2"
    tokens: int | None = None
    seed: int = 0
    connections: int = 8
    timeout: float = 30.0
    retries: int = 8


def _request(url: str, timeout: float, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "moda", **(headers or {})}, method=method)
    return urllib.request.urlopen(request, timeout=timeout)


def _retrying(
    url: str, once: Callable[[], T], retries: int, progressed: Callable[[OSError], bool] = lambda e: False
) -> T:
    """What ``once`` returns, tried again after errors that may pass; progress resets the count of attempts.

    :raises OSError: the last error.
    """
    attempt = 0
    while True:
        try:
            return once()
        except (OSError, http.client.HTTPException) as e:
            error = e if isinstance(e, OSError) else OSError(str(e) or type(e).__name__)
            attempt = 0 if progressed(error) else attempt + 1
            if attempt >= retries or getattr(e, "code", None) in _FINAL or error.errno == errno.ENOSPC:
                raise error from None
            log.info("%s: %s; trying again", url, getattr(e, "reason", None) or e)
            time.sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _continue_download(url: str, part: Path, size: int, timeout: float, note: Callable[[int], None]) -> str | None:
    """One attempt at the rest of a file; the MD5 that the server announced, if it did.

    :raises OSError: if it ends early.
    """
    if (have := _size(part)) > size:
        part.unlink()
        have = 0
    with _request(url, timeout, {"Range": f"bytes={have}-"} if have else {}) as reply:
        if have and reply.status != 206:  # a server without ranges sends it all again
            note(-have)
            have = 0
        with part.open("ab" if have else "wb") as f:
            while have < size:
                block = reply.read1(min(_BLOCK, size - have))
                if not block:
                    raise ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")
                f.write(block)
                have += len(block)
                note(len(block))
        announced, tag = reply.headers.get("Content-MD5"), (reply.headers.get("ETag") or "").strip('"')
    if announced:
        return base64.b64decode(announced).hex()
    return tag if re.fullmatch(r"[0-9a-f]{32}", tag) else None


class _Changed(OSError):
    """What arrived is not what the server announced."""


def fetch(url: str, path: Path, size: int, *, timeout: float, retries: int, note: Callable[[int], None]) -> str:
    """Download one file and return its SHA-256. An unfinished download is continued.

    :param size: bytes that it has.
    :param note: called with the number of bytes that arrived (negative where some are to come again).

    :raises UserError: when the attempts are used up, naming the last reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    before = _size(part)
    note(min(before, size))

    def once() -> str:
        md5 = None
        if is_url(url):
            md5 = _continue_download(url, part, size, timeout, note)
        else:
            shutil.copyfile(url, part)
            note(size - min(before, size))
        if _size(part) != size:
            raise _Changed(f"{_size(part):,} bytes arrived instead of {size:,}")
        if md5 is not None and hash_of(part, "md5") != md5:
            raise _Changed(f"its MD5 is not the announced {md5}")
        return hash_of(part)

    def progressed(e: OSError) -> bool:
        nonlocal before
        if isinstance(e, _Changed):  # nothing of it can be trusted
            note(-min(_size(part), size))
            part.unlink()
        last, before = before, _size(part)
        return before > last

    try:
        digest = _retrying(url, once, retries, progressed)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise UserError("folder", f"{decimal(size)} of disk space for {path}", hint="then run it again") from None
        reason = getattr(e, "reason", None) or e
        raise UserError("mirror", f"{url} to be downloaded", hint=f"{reason}; run it again to resume") from None
    part.replace(path)
    return digest


def _plan(options: MirrorOptions) -> tuple[list[tuple[str, str]], dict[str, int], int]:
    """The files to have, the sizes of all files of the mix, and the width of a token."""
    tokenizer = load_tokenizer(TokenizerSection(options.tokenizer))
    width = token_dtype(tokenizer.config.vocab_size).itemsize
    files = mix_paths("mix", options.mix, tokenizer)

    def size_of(url: str) -> int:
        def ask() -> int:
            with _request(url, options.timeout, method="HEAD") as reply:
                length = reply.headers.get("Content-Length")
            if length is None:
                raise UserError("--from", f"a server that announces the size of {url}")
            return int(length)

        return _retrying(url, ask, min(options.retries, _SIZE_RETRIES)) if is_url(url) else Path(url).stat().st_size

    paths = [path for _, path in files]
    sizes = load_sizes("--from", options.source, options.mix, paths, Path(options.folder) / "mirror", size_of)
    files = list(dict.fromkeys(files))  # a file that the mix lists twice is downloaded once
    if options.tokens is not None:
        files = choose_subset(files, sizes, options.tokens, width, options.seed)
    return files, sizes, width


def _missing(
    folder: Path, files: list[tuple[str, str]], sizes: dict[str, int], sums: dict[str, str], verify: bool
) -> list[str]:
    """Files that are not there, have another size, or (when verifying) another hash than when they came."""
    missing = []
    for _, name in files:
        path = folder / name
        if name not in sums or _size(path) != sizes[name]:
            missing.append(name)
        elif verify and hash_of(path) != sums[name]:
            log.warning("%s has changed since it was downloaded: it is fetched again", path)
            missing.append(name)
    return missing


def mirror(options: MirrorOptions, console: Console, *, dry_run: bool = False, verify: bool = False) -> int:
    """Make or complete a mirror; the exit code.

    :raises UserError: for an unknown mix, a budget larger than it, or a file that cannot be downloaded.
    """
    folder = Path(options.folder)
    files, sizes, width = _plan(options)
    sums_file = folder / "mirror" / "sha256.json"  # of every file of a mirror, as it was when it had been verified
    sums: dict[str, str] = read_json(sums_file, "folder") if sums_file.is_file() else {}
    missing = _missing(folder, files, sizes, sums, verify)
    by_label: Counter[str] = Counter()
    for label, name in files:
        by_label[label] += sizes[name]
    total, left = by_label.total(), sum(sizes[name] for name in missing)
    whole = f"{len(files):,} files, {decimal(total)}, {total // width:,} tokens"
    console.print(f"{options.mix}: {whole}; {len(missing):,} files ({decimal(left)}) to download", highlight=False)
    for label, size in by_label.items():
        console.print(f"  {label}: {size // width:,} tokens ({size / total:.2%})", highlight=False)
    if dry_run:
        return 0
    free = shutil.disk_usage(folder).free
    if left > free:
        raise UserError("folder", f"{decimal(left)} of free space in {folder}", decimal(free))
    _download(options, console, {name: sizes[name] for name in missing}, sums, sums_file)
    listing = {
        "mix": options.mix, "tokens": options.tokens, "seed": options.seed, "tokenizer": options.tokenizer,
        "files": [[label, name, sizes[name]] for label, name in files],
    }  # fmt: skip
    write_json(subset_file(folder, options.mix, options.tokens, options.seed), listing)
    console.print(f"complete: data.base_dir: {folder}", highlight=False, soft_wrap=True)
    return 0


def _download(
    options: MirrorOptions, console: Console, sizes: dict[str, int], sums: dict[str, str], sums_file: Path
) -> None:
    """Download the files of these sizes; their hashes are added to ``sums`` and its file."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    lock = threading.Lock()
    errors: list[UserError] = []
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("downloading", total=sum(sizes.values()))

        def one(name: str) -> None:
            url, path = f"{options.source.rstrip('/')}/{name}", Path(options.folder) / name
            patience: dict[str, Any] = {"timeout": options.timeout, "retries": options.retries}
            try:
                digest = fetch(url, path, sizes[name], **patience, note=lambda n: bar.advance(task, n))
            except UserError as e:  # the other files still come
                errors.append(e)
                return
            with lock:
                sums[name] = digest
                write_json(sums_file, sums)

        with ThreadPoolExecutor(options.connections) as pool:
            list(pool.map(one, sizes))
    for e in errors[1:]:
        log.error("%s", e)
    if errors:
        raise errors[0]
