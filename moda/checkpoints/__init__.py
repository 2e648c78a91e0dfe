"""Checkpoints: telling their kind, finding the newest whole one, checksums, reading without running anything from the folder.

A checkpoint of a run (``stepN``) holds ``config.json``, the weights and the optimizer's state (``model_and_optim/``), the
trainer's state (``train/``) and ``checksums.json``.
"""

from .choose import Chosen, choose_slots
from .find import STATE, choose_checkpoint, find_resumable, kind_of
from .keep import checkpoints_of_run, remove_old
from .own import OwnCheckpointer, check_own, read_trainer_state, saving_alone
from .read import Checkpoint, embedding_rows, load_model, match_weights, open_checkpoint, read_weights
from .seal import CHECKSUMS, damage, write_checksums
from .settings import changed_settings, check_same_model, check_same_run, read_settings

__all__ = [
    "CHECKSUMS",
    "STATE",
    "Checkpoint",
    "Chosen",
    "OwnCheckpointer",
    "changed_settings",
    "check_own",
    "check_same_model",
    "check_same_run",
    "checkpoints_of_run",
    "choose_checkpoint",
    "choose_slots",
    "damage",
    "embedding_rows",
    "find_resumable",
    "kind_of",
    "load_model",
    "match_weights",
    "open_checkpoint",
    "read_settings",
    "read_trainer_state",
    "read_weights",
    "remove_old",
    "saving_alone",
    "write_checksums",
]
