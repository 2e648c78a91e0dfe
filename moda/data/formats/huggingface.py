"""Hugging Face datasets, by name or folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import Piece, Records, TextFormat


class HuggingFace(TextFormat):
    """What ``datasets`` loads, shared among tasks. Options: ``config``, ``split`` and ``streaming`` of the source."""

    name = "huggingface"
    automatic = False
    in_files = False

    def documents(self, piece: Piece, records: Records) -> Iterator[tuple[str, str]]:
        from datatrove.data import Document
        from datatrove.pipeline.readers import HuggingFaceDatasetReader

        class Rows(HuggingFaceDatasetReader):
            """datatrove's reader drops rows without text in silence; here they are checked like all records."""

            def get_document_from_dict(self, data: dict, source_file: str, id_in_file: int | str) -> Any:
                text = records.accept(records.of_record, data, f"row {id_in_file} of dataset {source_file}")
                return None if text is None else Document(text=text, id=f"{source_file}#{id_in_file}")

        options, folder = records.options, Path(piece.path).expanduser()
        saved = folder.is_dir() and (folder / "state.json").is_file()  # written by `save_to_disk`
        load = {"split": options["split"], **({"name": options["config"]} if options["config"] else {})}
        streaming = options["streaming"] and not saved
        reader = Rows(piece.path, load, streaming, batch_size=256, text_key=records.field, load_from_disk=saved)
        for document in reader.run(None, piece.start, piece.end):
            yield document.text, document.id
