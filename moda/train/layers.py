"""Figures of single layers while a run trains: gradient norms, the residual stream, and what the attention looks at."""

import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from olmo_core.distributed.utils import get_full_tensor
from olmo_core.train.callbacks import Callback
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.utils import get_total_norm

from moda.config.model import ModelConfig

from .environment import on_first_rank

_TOKENS = 128


@dataclass
class LayersCallback(Callback):
    """Records ``NAME/layerN`` every ``interval`` steps: ``grad_norm`` of the blocks' parameters before clipping, and on the first
    tokens of the batch ``stream_rms`` before each block, ``depth_mass`` and ``sink_mass`` (see :class:`moda.visualize.Look`).

    Rank 0 measures with the exported form of the model, in fp32, so that training stays as it is, compiled and sharded.

    :param model: the model's section, with the vocabulary that is exported.
    """

    model: ModelConfig | None = None
    interval: int = 100
    _tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def pre_step(self, batch: dict[str, Any]) -> None:
        self._tokens = batch["input_ids"][0, :_TOKENS]  # read on the steps that are measured: it may be on a GPU

    def pre_optim_step(self) -> None:
        if self.step % self.interval:
            return
        net = self.trainer.train_module.model  # type: ignore[attr-defined]
        grads: dict[int, list[torch.Tensor]] = {}
        for name, p in net.named_parameters():
            block = re.search(r"\bblocks\.(\d+)\.", name)
            if block is not None and p.grad is not None:
                grads.setdefault(int(block[1]), []).append(p.grad)
        figures = {f"grad_norm/layer{i}": get_full_tensor(get_total_norm(g)).item() for i, g in sorted(grads.items())}
        weights = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        figures.update(on_first_rank(lambda: self._look(cast(dict[str, torch.Tensor], weights))))
        for name, value in figures.items():
            self.trainer.record_metric(f"layers/{name}", value)

    def _look(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        from moda.generate import build_decoder
        from moda.hf import to_hf
        from moda.visualize import look

        assert self.model is not None and self.model.vocab_size is not None
        decoder = build_decoder(self.model, to_hf(weights, self.model.vocab_size)).to(self.trainer.device)
        ids = self._tokens.tolist()
        seen = look(decoder, ids, [str(i) for i in ids], "")
        figures: dict[str, float] = {}
        for name, values in (("depth_mass", seen.depth_mass()), ("sink_mass", seen.sink_mass())):
            figures.update({f"{name}/layer{i}": value for i, value in enumerate(values.mean(-1).tolist())})
        if seen.streams is not None:
            sizes = seen.streams.square().mean((1, 2)).sqrt().tolist()[:-1]
            figures.update({f"stream_rms/layer{i}": value for i, value in enumerate(sizes)})
        return figures
