"""The depth stream: what layers leave for deeper layers within one forward pass.

:mod:`.layout` says which slots exist, :mod:`.stream` owns the buffers, :mod:`.ops` writes and reads them under autograd,
:mod:`.deferral` plans when deferred gradients are added, :mod:`.masked` reads under a given mask.
"""

from .layout import ATTENTION, FFN, DepthLayout
from .ops import depth_attention, depth_write, slot_attention
from .stream import DepthStream

__all__ = ["ATTENTION", "FFN", "DepthLayout", "DepthStream", "depth_attention", "depth_write", "slot_attention"]
