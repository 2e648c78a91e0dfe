"""``data.paths``: token files."""

from __future__ import annotations

from .base import DataSource, Request, Selection, stem

__all__ = ["Paths"]


class Paths(DataSource):
    """Token files, all of them."""

    name = "paths"

    def select(self, request: Request) -> Selection:
        paths = request.find("data.paths", request.data.paths or [])
        return Selection.whole(paths, [stem(p) for p in paths], request.dtype.itemsize)
