"""The depth stream: what layers leave for deeper layers within one forward pass.

:mod:`.layout` says which slots exist, :mod:`.stream` owns the buffers, :mod:`.ops` writes and reads them under autograd,
:mod:`.deferral` plans when deferred gradients are added, :mod:`.masked` reads under a given mask, :mod:`.stages` takes slots from
one stream to another.
"""

from .layout import ATTENTION, FFN, DepthLayout
from .ops import depth_attention, depth_write, slot_attention
from .stages import receive_slots, send_slots
from .stream import DepthStream

__all__ = [
    "ATTENTION", "FFN", "DepthLayout", "DepthStream", "depth_attention", "depth_write", "receive_slots", "send_slots",
    "slot_attention",
]  # fmt: skip
