"""Compressed files: recognized by their suffix or, where the name does not say so, by their first bytes."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from moda.errors import UserError

# suffix: how a file begins, as (offset, bytes)
_MAGIC: dict[str, tuple[tuple[int, bytes], ...]] = {
    ".gz": ((0, b"\x1f\x8b\x08"),),
    ".xz": ((0, b"\xfd7zXZ\x00"),),
    ".zst": ((0, b"\x28\xb5\x2f\xfd"),),
    ".bz2": ((0, b"BZh"), (4, b"1AY&SY")),
}
#: What reading a damaged compressed file raises, zstd's own error aside.
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_HEAD = 1 << 16
_BLOCK = 1 << 20


def compression_of(path: str) -> str:
    """The suffix of a file's compression (``.gz``, ``.xz``, ``.zst``, ``.bz2``), or an empty string.

    :raises OSError: if the file cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix in _MAGIC:
        return suffix
    with open(path, "rb") as f:
        head = f.read(16)
    return next((s for s, parts in _MAGIC.items() if all(head[at:].startswith(magic) for at, magic in parts)), "")


def format_suffix(path: str) -> str:
    """The suffix that names a file's format, below that of a compression: ``.jsonl`` for ``a.JSONL.gz``."""
    p = Path(path.lower())
    return Path(p.stem).suffix if p.suffix in _MAGIC else p.suffix


class _ZstdStream(io.RawIOBase):
    """A zstd file with any number of frames. The library's own reader does not notice that a frame was cut short."""

    def __init__(self, raw: IO[bytes], path: str) -> None:
        try:
            import zstandard
        except ImportError:
            hint = "pip install -e '.[data]' in a clone of this project brings it"
            raise UserError(path, "the package zstandard, which reads .zst files", hint=hint) from None
        self._library, self._raw = zstandard, raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def _decompress(self, data: bytes) -> bytes:
        out = []
        while data:
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                out.append(self._frame.decompress(data))
            except self._library.ZstdError as e:
                raise EOFError(str(e)) from None
            if not self._frame.eof:
                break
            data, self._frame = self._frame.unused_data, None
        return b"".join(out)

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._raw.read(_BLOCK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the last zstd frame was cut short")
                return 0
            self._ready = memoryview(self._decompress(data))
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def open_contents(raw: IO[bytes], path: str) -> IO[bytes]:
    """The contents of a file that is open for reading, decompressed where it is compressed."""
    openers: dict[str, Callable[[], Any]] = {
        ".gz": lambda: gzip.GzipFile(fileobj=raw),
        ".xz": lambda: lzma.LZMAFile(raw),
        ".bz2": lambda: bz2.BZ2File(raw),
        ".zst": lambda: io.BufferedReader(_ZstdStream(raw, path), _BLOCK),  # type: ignore[arg-type]
    }
    return openers.get(compression_of(path), lambda: raw)()


def read_head(path: str) -> bytes:
    """The first 64 KiB of a file's contents, decompressed; empty if the file cannot be read."""
    try:
        with open(path, "rb") as raw:
            return open_contents(raw, path).read(_HEAD)
    except (OSError, *BROKEN):
        return b""
