"""``data.mix``: a data mix of OLMo-core under a base directory."""

from moda.data.mixes import mix_files

from .base import DataSource, Request, Selection


class Mix(DataSource):
    """The files of a mix, or the subset of them that holds ``data.mix_tokens``."""

    name = "mix"

    def select(self, request: Request) -> Selection:
        assert request.data.mix is not None
        width = request.dtype.itemsize
        paths, labels = mix_files("data.mix", request.data.mix, request.data, request.tokenizer, width)
        request.check("data.mix", paths)
        return Selection.whole(paths, labels, width)
