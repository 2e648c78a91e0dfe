"""Parquet: a document per row, from a column of strings."""

from collections.abc import Iterator

from .base import BadRecord, Piece, Records, TextFormat, decode


class Parquet(TextFormat):
    """Parquet files, cut between row groups."""

    name = "parquet"
    suffixes = frozenset({".parquet"})

    def recognizes(self, suffix: str, head: bytes, field: str) -> bool:
        return suffix in self.suffixes or head.startswith(b"PAR1")

    def pieces(self, path: str, size: int, target: int) -> Iterator[Piece]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            meta = pq.read_metadata(path) if size > target else None
        except (pa.ArrowException, OSError):
            meta = None  # broken: reading it says so
        if meta is None:
            yield Piece(self.name, path, size=size)
            return
        weights = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
        scale = size / max(sum(weights), 1)
        first, taken = 0, 0.0
        for i, weight in enumerate(weights):
            taken += weight * scale
            if taken >= target or i == len(weights) - 1:
                yield Piece(self.name, path, first, i + 1, int(taken))
                first, taken = i + 1, 0.0

    def documents(self, piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = 0
        try:
            with pq.ParquetFile(piece.path) as file:
                names = file.schema_arrow.names
                if records.field not in names:
                    expected, hint = f"a column {records.field!r}", f"found {', '.join(names)[:200]}"
                    records.reject(BadRecord("missing_field", expected, hint), piece.path)
                    return
                groups = list(range(piece.start, file.num_row_groups if piece.end < 0 else piece.end))
                for batch in file.iter_batches(256, row_groups=groups, columns=[records.field]):
                    column = batch.column(0)
                    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                        column = column.cast(pa.large_binary())  # decoded here, so that an error names its row
                    for value in column.to_pylist():
                        row += 1
                        where = f"{piece.path}, row {row} from row group {piece.start}"
                        text = records.accept(lambda v: decode(v) if isinstance(v, bytes) else v, value, where)
                        if text is not None:
                            yield text, where
        except (pa.ArrowException, OSError) as e:
            bad = BadRecord("broken_file", "a whole parquet file", str(e).split("\n")[0])
            records.reject(bad, f"{piece.path} after row {row}" if row else piece.path)
