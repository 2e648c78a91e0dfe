"""Mixture-of-Depths Attention (MoDA, arXiv 2603.15619): one softmax over the sequence and what earlier layers left.

``pip install ./kernels`` installs this package alone; it needs torch, and Triton for its GPU kernels, which are loaded when
first used. The operator takes B sequences of T tokens, Hq query and Hk key/value heads of width D, and S depth slots:

    import torch
    from moda_kernels import moda_attention

    B, T, Hq, Hk, D, S = 2, 4096, 16, 8, 64, 12
    options = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(B, T, Hq, D, **options)
    k, v = (torch.randn(B, T, Hk, D, **options) for _ in range(2))
    depth_k, depth_v = (torch.randn(S, B, T, Hk, D, **options) for _ in range(2))

    out = moda_attention(q, k, v, depth_k, depth_v)                      # [B, T, Hq, D]
    out = moda_attention(q, k, v, depth_k, depth_v, slots=[0, 3, 11])    # reads three of the slots
    out = moda_attention(q, None, None, depth_k, depth_v)                # depth alone
    out.sum().backward()

What it computes stands in :mod:`moda_kernels.moda_attention.naive`. A model of many layers does not collect S gradients per
layer: its layers write to and read from a :class:`DepthStream` (:mod:`moda_kernels.depth`).
"""

from __future__ import annotations

from .depth import (
    ATTENTION,
    FFN,
    DepthLayout,
    DepthStream,
    depth_attention,
    depth_write,
    receive_slots,
    send_slots,
    slot_attention,
)
from .moda_attention import available_backends, moda_attention, sequence_kernel

__all__ = [
    "ATTENTION", "FFN", "DepthLayout", "DepthStream", "available_backends", "depth_attention", "depth_write",
    "moda_attention", "receive_slots", "send_slots", "sequence_kernel", "slot_attention",
]  # fmt: skip
