"""``data.mixture``: sources in given shares."""

from moda.data.mixture import draw, labels_of

from .base import DataSource, Request, Selection


class Mixture(DataSource):
    """Some sequences of the token files of several sources."""

    name = "mixture"

    def select(self, request: Request) -> Selection:
        mixture = request.data.mixture
        if mixture is None or request.total_tokens is None or request.tokens_per_step is None:
            raise ValueError("a mixture needs the run's total tokens and tokens per step")
        files = {n: request.find(f"data.mixture.sources.{n}.paths", s.paths) for n, s in mixture.sources.items()}
        mixed, drawn = draw(
            mixture, files, total_tokens=request.total_tokens, tokens_per_step=request.tokens_per_step,
            sequence_length=request.sequence_length, dtype=request.dtype,
        )  # fmt: skip
        return Selection([], labels_of(mixed), drawn, mixed)
