"""Tile choices on disk: measured once per card, checked against what there is to choose from, never in the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from moda_kernels.moda_attention import tile_cache, tiles
from moda_kernels.moda_attention.tiles import Tile, TileChooser

SLOW, FAST, OTHER = (
    Tile(keys=32, stages=1, warps=4),
    Tile(keys=64, stages=2, warps=4),
    Tile(keys=128, stages=1, warps=8),
)
PROBLEM: Any = SimpleNamespace(device=torch.device("cuda", 0), head_dim=64)


class Card:
    """A GPU that is not there: what launches, and what has been timed."""

    def __init__(self) -> None:
        self.timed: list[Tile] = []
        self.too_large: set[Tile] = set()

    def launch(self, tile: Tile) -> None:
        if tile in self.too_large:
            raise OutOfResources(1, 0, "shared memory")

    def time(self, run: Any) -> float:
        (tile,) = run.args
        self.timed.append(tile)
        return {SLOW: 3.0, FAST: 1.0, OTHER: 2.0}[tile]

    def choose(self, *listed: Tile) -> Tile:
        """What a new process chooses."""
        self.timed.clear()
        return TileChooser("kernel", listed, ()).choose((0, "problem"), PROBLEM, self.launch)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    card = Card()
    monkeypatch.setenv("MODA_TILE_CACHE", str(tmp_path / "new" / "tiles.json"))
    monkeypatch.setenv("MODA_AUTOTUNE", "1")
    monkeypatch.setattr(tile_cache, "cards", lambda device: ("sm90", "sm90, 132"))
    monkeypatch.setattr(tile_cache, "MEASURED", tmp_path / "measured.json")
    monkeypatch.setattr(tiles, "_time", card.time)
    tile_cache._say.cache_clear()
    return card


def test_a_second_process_does_not_time(card: Card, tmp_path: Path) -> None:
    assert card.choose(SLOW, FAST, OTHER) == FAST and card.timed == [SLOW, FAST, OTHER]
    assert card.choose(SLOW, FAST, OTHER) == FAST and not card.timed
    written = json.loads((tmp_path / "new" / "tiles.json").read_text())
    assert written["sm90, 132"]["kernel"]["problem"]["keys"] == 64
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tiles.json"]


def test_a_choice_that_is_not_listed_or_does_not_fit_is_made_again(card: Card) -> None:
    card.choose(SLOW, FAST, OTHER)
    assert card.choose(SLOW, OTHER) == OTHER and card.timed == [SLOW, OTHER]
    card.too_large = {OTHER}
    assert card.choose(SLOW, FAST, OTHER) == FAST and card.timed == [SLOW, FAST]


def test_the_packages_choice_comes_after_the_users(card: Card) -> None:
    tile_cache.MEASURED.write_text(
        json.dumps({"sm90": {"kernel": {"problem": {"keys": 128, "stages": 1, "warps": 8}}}})
    )
    assert card.choose(SLOW, FAST, OTHER) == OTHER and not card.timed
    tile_cache.remember(PROBLEM.device, "kernel", "problem", SLOW)
    assert card.choose(SLOW, FAST, OTHER) == SLOW and not card.timed


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"sm90, 132": 1}',
        '{"sm90, 132": {"kernel": {"problem": {"kees": 1}}}}',
        "\x00",
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_damaged_file_is_done_without(text: str, card: Card, caplog: pytest.LogCaptureFixture) -> None:
    path = tile_cache.user_file()
    assert path is not None
    path.parent.mkdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING, tile_cache.__name__):
        assert card.choose(SLOW, FAST, OTHER) == FAST
    assert bool(caplog.messages) == (not text.startswith('{"'))
    assert card.choose(SLOW, FAST, OTHER) == FAST and not card.timed, "it has been written anew"


def test_a_folder_that_cannot_be_written_is_said_once(
    card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MODA_TILE_CACHE", str(tmp_path / "file" / "tiles.json"))
    for _ in range(2):
        assert card.choose(SLOW, FAST) == FAST
    assert len([m for m in caplog.messages if "cannot be written" in m]) == 1


def test_a_user_without_a_home_has_no_file(
    card: Card, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MODA_TILE_CACHE", "~nobody-of-this-name/tiles.json")
    for _ in range(2):
        assert tile_cache.user_file() is None and card.choose(SLOW, FAST) == FAST
    assert len([m for m in caplog.messages if "cannot be found" in m]) == 1


def test_without_autotuning_or_without_a_file_nothing_is_kept(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tile_cache.user_file()
    monkeypatch.setenv("MODA_AUTOTUNE", "0")
    assert card.choose(SLOW, FAST) == SLOW and path is not None and not path.exists()
    monkeypatch.setenv("MODA_AUTOTUNE", "1")
    monkeypatch.setenv("MODA_TILE_CACHE", "")
    assert tile_cache.user_file() is None and card.choose(SLOW, FAST) == FAST and not path.exists()
