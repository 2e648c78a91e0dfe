"""``data.paths``: token files."""

from .base import DataSource, Request, Selection, stem


class Paths(DataSource):
    """Token files, all of them."""

    name = "paths"

    def select(self, request: Request) -> Selection:
        paths = request.find("data.paths", request.data.paths or [])
        return Selection.whole(paths, [stem(p) for p in paths], request.dtype.itemsize)
