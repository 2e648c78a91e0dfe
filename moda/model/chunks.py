"""Context parallelism: ranks share the tokens of a sequence, and only the attention over the sequence communicates.

A sequence is cut into 2N chunks for N ranks; rank r holds the chunks r and 2N - 1 - r (OLMo-core's zig-zag order), so that all
ranks have equally much to attend to. A token's depth slots stay where the token is.
"""

from __future__ import annotations

import torch
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

__all__ = ["past_chunks"]


def past_chunks(k: torch.Tensor, v: torch.Tensor, mesh: DeviceMesh) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The keys and values of all ranks, in the order of the sequence, and how many chunks precede each of this rank's two.

    :param k, v: ``[B, 2 T, Hk, D]``, this rank's chunks.

    :returns: two tensors ``[2N, B, T, Hk, D]``, whose gradients go back to the ranks that they are from, and two numbers.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    pair = torch.stack((k, v)).unsqueeze(0)
    gathered = DTensor.from_local(pair, mesh, [Shard(0)], run_check=False).redistribute(placements=[Replicate()])
    chunks = gathered.to_local(grad_placements=[Partial()]).unflatten(3, (2, -1))  # [N, 2, B, 2, T, Hk, D]
    in_order = torch.cat((chunks[:, :, :, 0], chunks[:, :, :, 1].flip(0)))
    return in_order[:, 0], in_order[:, 1], [rank, 2 * ranks - 1 - rank]
