"""FlashAttention 4 (the package ``flash-attn-4``), which compiles a kernel for each new kind of problem when first called.

The package is in beta and the two functions used here are not part of its public interface: whether those installed take what
is passed to them is looked at once, on a device that could run them, and said by name where they do not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from ..problem import Kind, Problem
from .kernel import Gradients, SequenceKernel, packed, unpacked

log = logging.getLogger(__name__)

PACKAGE, MODULE, NEEDED = "flash-attn-4", "flash_attn.cute.interface", "4.0.0b36"
_OPTIONS = ("softmax_scale", "causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
#: The functions and the arguments they are given, all of them by name.
_TAKES = {
    "_flash_attn_fwd": {"q", "k", "v", "return_lse", *_OPTIONS},
    "_flash_attn_bwd": {"q", "k", "v", "out", "dout", "lse", *_OPTIONS},
}


class FlashAttention4(SequenceKernel):
    """On Hopper and Blackwell, imported when first looked for there; packed documents too."""

    name = "flash_attn_4"
    ranks = (0, 0)

    def missing(self, device: torch.device) -> str | None:
        if (reason := super().missing(device)) is not None:
            return reason
        if torch.cuda.get_device_capability(device)[0] not in (9, 10):
            return f"{self.name} needs compute capability 9.x or 10.x"
        try:
            version = importlib.metadata.version(PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.name}: the package {PACKAGE} is not installed"
        reason = _unusable()
        if reason is not None:
            reason = f"{self.name} needs {PACKAGE} {NEEDED} or one that can be called like it, got {version}: {reason}"
            log.warning("moda_attention: %s", reason)  # somebody installed it to use it
        return reason

    def unsupported(self, kind: Kind) -> str | None:
        if not kind.causal and kind.head_dim in (104, 112):  # on Hopper its backward for them does not compile
            return f"head dim {kind.head_dim}: {self.name} takes it with a causal mask only"
        return super().unsupported(kind)

    def describe(self) -> str:
        return f"{self.name} ({PACKAGE} {importlib.metadata.version(PACKAGE)})"

    def _call(self, p: Problem, name: str, **arguments: Any) -> Any:
        cu, longest = p.cu_seqlens, None if p.cu_seqlens is None else p.max_seqlen
        return getattr(importlib.import_module(MODULE), name)(
            **arguments, softmax_scale=p.scale, causal=p.causal, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
            max_seqlen_k=longest,
        )  # fmt: skip

    def forward(self, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = packed(p, q, k, v)
        out, lse, *_ = self._call(p, "_flash_attn_fwd", q=q, k=k, v=v, return_lse=True)
        return unpacked(p, out, lse)

    def backward(self, p: Problem, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        do, q, k, v, out, lse = packed(p, do, q, k, v, out, lse)
        return unpacked(p, *self._call(p, "_flash_attn_bwd", q=q, k=k, v=v, out=out, dout=do, lse=lse))


def _unusable() -> str | None:
    """Why the installed package cannot be called as above, or None."""
    try:
        module = importlib.import_module(MODULE)
    except Exception as error:  # its own dependencies fail in ways of their own where their versions do not fit
        return f"importing {MODULE} fails: {error!r}"
    for name, takes in _TAKES.items():
        function = getattr(module, name, None)
        if function is None:
            return f"it has no {name}"
        if lacks := sorted(takes - inspect.signature(function).parameters.keys()):
            return f"its {name} does not take {', '.join(lacks)}"
    return None
