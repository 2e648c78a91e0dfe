"""Continuations of one text in one row of a batch: the text runs once, every continuation sees it and itself only.

    ids         text text text | a a | b b b | c
    position    0    1    2      3 4   3 4 5   3
    sees        itself and what is before it in the text and in its own continuation

The questions of a multiple-choice task ask for several continuations of the same context, which is usually the longer part.
Positions reach the rotation through its own ``pos_sin`` and ``pos_cos``; depth slots belong to a token and need nothing.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from olmo_core.nn.attention import Attention
from olmo_core.nn.attention.backend import TorchAttentionBackend
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.rope import RotaryEmbedding
from olmo_core.nn.transformer import Transformer

#: Longest row of a tree: its attention holds a mask of this size squared.
MAX_ROW = 1024
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A text and its continuations. One without continuations, or with one, is an ordinary sequence.

    :param leaves: what follows ``stem`` in each sequence.
    """

    stem: Ids
    leaves: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Tokens that run through the model."""
        return len(self.stem) + sum(map(len, self.leaves))

    @property
    def sequences(self) -> list[Ids]:
        """What the tree stands for, in the order of its leaves."""
        return [self.stem + leaf for leaf in self.leaves]

    def columns(self, leaf: int, start: int, n: int) -> list[int]:
        """Where positions ``start`` to ``start + n - 1`` of a leaf's sequence lie in the tree's row."""
        shift = sum(map(len, self.leaves[:leaf]))
        return [p if p < len(self.stem) else p + shift for p in range(start, start + n)]


def grow(sequences: Sequence[Ids], stems: Sequence[int], share: bool) -> list[Tree]:
    """Trees over distinct sequences.

    :param stems: for each sequence how long the part is that it may share with others.
    :param share: False makes a tree of every sequence. So does a group that would save less than a fifth of its tokens.
    """
    groups: dict[Ids, list[Ids]] = {}
    for ids, stem in zip(sequences, stems):
        groups.setdefault(ids[:stem] if share else ids, []).append(ids[stem:] if share else ())
    trees = []
    for stem_ids, leaves in groups.items():
        tree = Tree(stem_ids, tuple(leaves))
        saved = (len(leaves) - 1) * len(stem_ids)
        worthwhile = saved * 4 >= tree.length and tree.length <= MAX_ROW
        trees += [tree] if worthwhile else [Tree(ids, ((),)) for ids in tree.sequences]
    return trees


@dataclass(frozen=True)
class Layout:
    """A batch of trees: ``ids``, ``positions`` and ``parts`` (0 the text, 1 and up the continuations, -1 padding), ``[B, T]``."""

    ids: torch.Tensor
    positions: torch.Tensor
    parts: torch.Tensor

    @property
    def is_plain(self) -> bool:
        """Whether every row is an ordinary sequence."""
        return not bool((self.parts > 0).any())

    def mask(self, device: torch.device) -> torch.Tensor:
        """Bool ``[B, T, T]``: which tokens (last dimension) each token sees."""
        part = self.parts.to(device)
        seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        return seen & torch.ones(seen.shape[1:], dtype=torch.bool, device=device).tril()


def lay_out(trees: Sequence[Tree], multiple: int = 1) -> Layout:
    """Trees as rows, padded on the right to a width divisible by ``multiple``."""
    width = -(-max(t.length for t in trees) // multiple) * multiple
    rows = []
    for tree in trees:
        stem, padding = len(tree.stem), width - tree.length
        ids = [*tree.stem, *itertools.chain(*tree.leaves)] + [0] * padding
        positions = [*range(stem), *(p for leaf in tree.leaves for p in range(stem, stem + len(leaf)))] + [0] * padding
        parts = [0] * stem + [i for i, leaf in enumerate(tree.leaves, 1) for _ in leaf] + [-1] * padding
        rows.append((ids, positions, parts))
    return Layout(*torch.tensor(rows).unbind(1))


def can_share(module: nn.Module) -> bool:
    """Whether a model can run trees: one of this project that says so or of OLMo-core with ordinary attention, not compiled."""
    if not isinstance(module, Transformer) or module.compile_enabled:
        return False
    mixers = [part for part in module.modules() if isinstance(part, SequenceMixer)]
    if any(type(getattr(mixer, "rope", None)) not in (RotaryEmbedding, type(None)) for mixer in mixers):
        return False
    says = getattr(module, "shares_prefix", None)
    return bool(mixers) and all(map(_is_ordinary, mixers)) if says is None else says


def _is_ordinary(mixer: SequenceMixer) -> bool:
    if type(mixer) is not Attention:
        return False
    plain = isinstance(mixer.backend, TorchAttentionBackend) and mixer.backend.window_size == (-1, -1)
    return plain and mixer.sinks is None and not mixer.scalable_softmax


def _rotation_input(positions: torch.Tensor, module: RotaryEmbedding, args: Any, _kwargs: Any) -> tuple[Any, Any]:
    """The whole batch as one row whose sines and cosines are those of each token's own position."""
    q, k = args
    buffers = module.get_buffers(int(positions.shape[1]), q.device)
    assert buffers.pos_sin is not None and buffers.pos_cos is not None
    flat = positions.flatten()
    kwargs = {"head_first": False, "pos_sin": buffers.pos_sin[flat], "pos_cos": buffers.pos_cos[flat]}
    return (q.flatten(0, 1)[None], k.flatten(0, 1)[None]), kwargs


def _rotation_output(positions: torch.Tensor, _module: nn.Module, _args: Any, output: Any) -> tuple[torch.Tensor, ...]:
    return tuple(x[0].unflatten(0, positions.shape) for x in output)


def _attention_output(mask: torch.Tensor, module: Any, args: tuple[Any, ...], _output: Any) -> torch.Tensor:
    """OLMo-core's SDPA again, with the mask in place of the causal one."""
    q, k, v = (x.transpose(1, 2) for x in args[0])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=module.scale)
    return out.transpose(1, 2).contiguous()


@contextlib.contextmanager
def shared_attention(module: nn.Module, layout: Layout, device: torch.device) -> Iterator[dict[str, Any]]:
    """While this is open, a call of ``module`` with the yielded keyword arguments runs ``layout.ids`` as trees."""
    mask, positions = layout.mask(device), layout.positions.to(device)
    with contextlib.ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, RotaryEmbedding):
                before, after = (functools.partial(f, positions) for f in (_rotation_input, _rotation_output))
                hooks.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(part.register_forward_hook(after).remove)
            elif isinstance(part, TorchAttentionBackend):
                hooks.callback(part.register_forward_hook(functools.partial(_attention_output, mask)).remove)
        yield {"mask": mask} if getattr(module, "shares_prefix", False) else {}
