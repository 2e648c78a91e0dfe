"""The ten sets of the paper's Table 5, which are those of OLMo-core's mix ``v3-small-ppl-validation``."""

from dataclasses import dataclass
from pathlib import Path

from olmo_core.data import DataMix
from olmo_core.io import is_url, resource_path

from moda.errors import UserError

from ..model import ModelInfo
from .base import DocumentSet, MissingData, OpenSet
from .token_files import open_token_files

MIX = DataMix.v3_small_ppl_validation


@dataclass(frozen=True)
class ValidationSet(DocumentSet):
    """A set of the mix; ``label`` is its name there."""

    label: str

    def open(self, model: ModelInfo, base_dir: str | None = None) -> OpenSet:
        """See :meth:`DocumentSet.open`. The file lies at ``eval-data/perplexity/v3_small_*`` under ``base_dir``."""
        if base_dir is None:
            expected = f"the folder or URL under which the validation sets of {MIX.value} lie"
            hint = "for example https://olmo-data.org, or a local mirror; --text NAME=PATH takes text of your own"
            raise UserError("--base-dir", expected, hint=hint)
        return open_token_files(self, [self._locate(base_dir, self._relative_path(model))], model)

    def _relative_path(self, model: ModelInfo) -> str:
        tokenizer = model.tokenizer_info
        if tokenizer is None or tokenizer.hub is None:
            name = "none" if tokenizer is None else tokenizer.name
            expected = "a model whose tokenizer the sets exist for (they are token files)"
            raise UserError("--sets", expected, name, "--text NAME=PATH takes text")
        try:
            paths, labels = MIX.build("", tokenizer.hub)
        except (ValueError, FileNotFoundError) as e:
            raise UserError("--sets", f"a tokenizer that {MIX.value} exists for", tokenizer.hub, str(e)) from None
        return str(paths[labels.index(f"{self.label}-validation")]).lstrip("/")

    def _locate(self, base_dir: str, relative: str) -> Path:
        hint = f"get it: python scripts/prepare_data.py mirror {MIX.value} FOLDER, then --base-dir FOLDER"
        if is_url(base_dir):
            address = f"{base_dir.rstrip('/')}/{relative}"
            try:
                return resource_path(base_dir.rstrip("/"), relative)
            except Exception as e:  # network clients raise many kinds
                reason = " ".join(str(e).split())[:120]
                raise MissingData(self.name, address, f"file not found: {reason}", hint) from None
        path = Path(base_dir).expanduser() / relative
        if not path.is_file():
            raise MissingData(self.name, f"the token file {path}", "file not found", hint)
        return path


#: The paper's columns in its order.
TABLE_5 = (
    ValidationSet("c4", "C4", "c4_en"),
    ValidationSet("ice", "ICE", "ice"),
    ValidationSet("m2d2_s2orc", "m2d2-s2orc", "m2d2_s2orc"),
    ValidationSet("pile", "Pile", "pile"),
    ValidationSet("wikitext", "Wiki-text", "wikitext_103"),
    ValidationSet("books", "Books", "dolma_books"),
    ValidationSet("cc", "CC", "dolma_common-crawl"),
    ValidationSet("pes2o", "peS2o", "dolma_pes2o"),
    ValidationSet("reddit", "Reddit", "dolma_reddit"),
    ValidationSet("stack", "Stack", "dolma_stack"),
)
