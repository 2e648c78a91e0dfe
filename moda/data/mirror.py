"""A local mirror of a data mix: downloaded in parallel, verified, resumed where it stopped.

A file is written beside its place as ``.<name>.part`` and moved there when it has the size that the server announced and, where
the server gives one, its MD5 (``Content-MD5``, or an ``ETag`` that is one, as S3's of files stored in one piece). A download that
stalls, breaks off or meets a server error is continued with a range request, up to a number of attempts.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import logging
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_core.io import is_url
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moda.config.schema import TokenizerSection
from moda.errors import UserError
from moda.files import read_json, write_json

from .manifest import sha256_of
from .mixes import choose_subset, load_sizes, mix_paths, subset_file
from .prepare.progress import format_bytes
from .token_files import token_dtype
from .tokenizer import load_tokenizer

__all__ = ["MirrorOptions", "fetch", "mirror", "remote_size"]

log = logging.getLogger(__name__)

_BLOCK = 1 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_SUMS = "sha256.json"  # of every file of a mirror, as it was when it had been verified
_FINAL = {400, 401, 403, 404, 410}  # HTTP errors that trying again does not mend
_BROKEN = (OSError, http.client.HTTPException)


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
    :param retries: attempts a file; progress resets the count.
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


def _pause(attempt: int) -> None:
    time.sleep(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE))


def remote_size(url: str, timeout: float = 30.0, retries: int = 8) -> int:
    """Bytes of a file at a URL or path.

    :raises OSError: if it cannot be told.
    """
    if not is_url(url):
        return Path(url).stat().st_size
    for attempt in range(retries):
        try:
            with _request(url, timeout, method="HEAD") as reply:
                length = reply.headers.get("Content-Length")
                if length is None:
                    raise UserError("--from", f"a server that tells the size of {url}")
                return int(length)
        except _BROKEN as e:
            if getattr(e, "code", None) in _FINAL or attempt == retries - 1:
                raise
            _pause(attempt)
    raise AssertionError


def _announced_md5(headers: Any) -> str | None:
    given = headers.get("Content-MD5")
    if given:
        return base64.b64decode(given).hex()
    tag = (headers.get("ETag") or "").strip('"')
    return tag if re.fullmatch(r"[0-9a-f]{32}", tag) else None


class _Changed(OSError):
    """What arrived is not what the server announced."""


def _continue_download(url: str, part: Path, size: int, timeout: float, note: Any) -> str | None:
    """One attempt at the rest of a file; the MD5 that the server announced, if it did.

    :raises OSError: if it ends early.
    """
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with _request(url, timeout, headers) as reply:
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
        return _announced_md5(reply.headers)


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, size: int, *, timeout: float, retries: int, note: Any = lambda n: None) -> str:
    """Download one file and return its SHA-256. An unfinished download is continued.

    :param size: bytes that it has.
    :param note: called with the number of bytes that arrived (negative where some are to come again).

    :raises UserError: when the attempts are used up, naming the last reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    attempt, before = 0, part.stat().st_size if part.exists() else 0
    note(min(before, size))
    while True:
        try:
            if not is_url(url):
                shutil.copyfile(url, part)
                note(size - min(before, size))
                md5 = None
            else:
                md5 = _continue_download(url, part, size, timeout, note)
            if part.stat().st_size != size:
                raise _Changed(f"{part.stat().st_size:,} bytes arrived instead of {size:,}")
            if md5 is not None and _md5_of(part) != md5:
                raise _Changed(f"its MD5 is not the announced {md5}")
            digest = sha256_of(part)
            part.replace(path)
            return digest
        except _BROKEN as e:
            if isinstance(e, OSError) and e.errno == 28:
                raise UserError(
                    "folder", f"{format_bytes(size)} of disk space for {path}", hint="then run it again"
                ) from None
            if isinstance(e, _Changed):  # nothing of it can be trusted
                note(-min(part.stat().st_size, size))
                part.unlink()
            now = part.stat().st_size if part.exists() else 0
            attempt = 0 if now > before and not isinstance(e, _Changed) else attempt + 1
            before = now
            reason = getattr(e, "reason", None) or e
            if getattr(e, "code", None) in _FINAL or attempt >= retries:
                raise UserError("mirror", f"{url} to be downloaded", hint=f"{reason}; run it again to go on") from None
            log.info("%s: %s; trying again", url, reason)
            _pause(attempt)


def _plan(options: MirrorOptions) -> tuple[list[tuple[str, str]], dict[str, int], int]:
    """The files to have, the sizes of all files of the mix, and the width of a token."""
    tokenizer = load_tokenizer(TokenizerSection(options.tokenizer))
    width = token_dtype(tokenizer.config.vocab_size).itemsize
    files = mix_paths("mix", options.mix, tokenizer)
    folder = Path(options.folder)
    key = hashlib.sha256(options.source.encode()).hexdigest()[:16]

    def size_of(url: str) -> int:
        return remote_size(url, options.timeout, options.retries)

    cache = folder / "mirror" / f"sizes-{options.mix}-{key}.json"
    sizes = load_sizes(options.source, [p for _, p in files], cache, size_of)
    files = list(dict.fromkeys(files))  # a file that the mix lists twice is downloaded once
    if options.tokens is not None:
        files = choose_subset(files, sizes, options.tokens, width, options.seed)
    return files, sizes, width


def _missing(
    folder: Path, files: list[tuple[str, str]], sizes: dict[str, int], sums: dict[str, str], verify: bool
) -> list[str]:
    """Files that are not there, have another size, or (when verifying) another hash than when they came."""
    found = []
    for _, name in files:
        path = folder / name
        if not path.is_file() or path.stat().st_size != sizes[name] or name not in sums:
            found.append(name)
        elif verify and sha256_of(path) != sums[name]:
            log.warning("%s has changed since it was downloaded: it is fetched again", path)
            found.append(name)
    return found


def mirror(options: MirrorOptions, console: Console, *, dry_run: bool = False, verify: bool = False) -> int:
    """Make or complete a mirror; the exit code.

    :raises UserError: for an unknown mix, a budget larger than it, or a file that cannot be had.
    """
    folder = Path(options.folder)
    files, sizes, width = _plan(options)
    sums_file = folder / "mirror" / _SUMS
    sums: dict[str, str] = read_json(sums_file, "folder") if sums_file.is_file() else {}
    missing = _missing(folder, files, sizes, sums, verify)
    total = sum(sizes[name] for _, name in files)
    left = sum(sizes[name] for name in missing)
    by_label: dict[str, int] = {}
    for label, name in files:
        by_label[label] = by_label.get(label, 0) + sizes[name]
    console.print(
        f"{options.mix}: {len(files):,} files, {format_bytes(total)}, {total // width:,} tokens; "
        f"{len(missing):,} files ({format_bytes(left)}) to download",
        highlight=False,
    )
    for label, held in by_label.items():
        console.print(f"  {label}: {held // width:,} tokens ({held / total:.2%})", highlight=False)
    if dry_run:
        return 0
    free = shutil.disk_usage(folder).free
    if left > free:
        raise UserError("folder", f"{format_bytes(left)} of free space in {folder}", format_bytes(free))
    _download(options, console, folder, missing, sizes, sums, sums_file)
    listing = {
        "mix": options.mix, "tokens": options.tokens, "seed": options.seed, "tokenizer": options.tokenizer,
        "files": [[label, name, sizes[name]] for label, name in files],
    }  # fmt: skip
    write_json(subset_file(folder, options.mix, options.tokens, options.seed), listing)
    console.print(f"complete: data.base_dir: {folder}", highlight=False, soft_wrap=True)
    return 0


def _download(
    options: MirrorOptions,
    console: Console,
    folder: Path,
    missing: list[str],
    sizes: dict[str, int],
    sums: dict[str, str],
    sums_file: Path,
) -> None:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    lock = threading.Lock()
    errors: list[UserError] = []
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("downloading", total=sum(sizes[n] for n in missing))

        def one(name: str) -> None:
            url = f"{options.source.rstrip('/')}/{name}"
            digest = fetch(
                url, folder / name, sizes[name], timeout=options.timeout, retries=options.retries,
                note=lambda n: bar.advance(task, n),
            )  # fmt: skip
            with lock:
                sums[name] = digest
                write_json(sums_file, sums)

        with ThreadPoolExecutor(options.connections) as pool:
            for done in as_completed([pool.submit(one, name) for name in missing]):
                e = done.exception()
                if isinstance(e, UserError):
                    errors.append(e)  # the other files still come
                elif e is not None:
                    raise e
    if errors:
        for e in errors[1:]:
            log.error("%s", e)
        raise errors[0]
