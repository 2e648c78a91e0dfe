"""One process without FSDP trains as FSDP2 does on one rank: to the bit."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import olmo_core.distributed.parallel
import pytest
import torch
import torch.distributed as dist
from olmo_core.config import DType
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.nn.transformer import Transformer
from olmo_core.optim import AdamWConfig
from olmo_core.train.train_module import TransformerTrainModule, TransformerTrainModuleConfig
from olmo_core.train.train_module.transformer import TransformerDataParallelConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moda.config.choices import Float8
from moda.config.model import ModelConfig
from moda.depth import DepthMechanism
from moda.model import transformer_config
from moda.train.float8 import apply_float8
from moda.train.module import OneProcessTrainModule
from moda.typed import from_dict
from moda_kernels.moda_attention.quantised import fp8_missing

VOCAB, LENGTH, CPU = 61, 16, torch.device("cpu")


def _build(section: dict[str, Any], float8: str | None = None) -> Transformer:
    """A model without weights yet.

    :param float8: how its linears multiply in float8; without torchao the test is skipped.
    """
    model = transformer_config(from_dict(ModelConfig, section, "model")).build(init_device="meta")
    if float8 is not None:
        if importlib.util.find_spec("torchao") is None:
            pytest.skip("needs the extra float8")
        apply_float8(model, Float8(float8))
    return model


def _one_process(
    section: dict[str, Any], float8: str | None, graph: bool, device: torch.device
) -> OneProcessTrainModule:
    return OneProcessTrainModule(
        _build(section, float8), half=torch.bfloat16, cuda_graph=graph, device=device, rank_microbatch_size=2 * LENGTH,
        max_grad_norm=1.0, max_sequence_length=LENGTH, optim=AdamWConfig(lr=1e-2), z_loss_multiplier=1e-3,
    )  # fmt: skip


def _train(
    module: TransformerTrainModule, steps: int = 3, batch: int = 4, device: torch.device = CPU, same: bool = False
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Losses and gradient norms of some steps of microbatches of two after a dry one, as in a run, and the weights after them.

    :param same: every step sees the same batch.
    """
    seen: list[dict[str, float]] = []

    def record(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        seen[-1][name] = float(value)

    def record_loss(value: Any, **kwargs: Any) -> None:
        record("loss", value)

    module._trainer = cast(Any, SimpleNamespace(record_metric=record, record_ce_loss=record_loss))
    module.model.init_weights(max_seq_len=LENGTH, device=device, world_mesh=module.world_mesh)
    generator = torch.Generator().manual_seed(1)
    seen.append({})
    module.train_batch({"input_ids": torch.zeros(batch, LENGTH, dtype=torch.int64)}, dry_run=True)
    seen.clear()
    for _ in range(steps):
        seen.append({})
        generator = torch.Generator().manual_seed(1) if same else generator
        module.zero_grads()
        module.train_batch({"input_ids": torch.randint(0, VOCAB, (batch, LENGTH), generator=generator)})
        module.optim_step()
    logits = module.eval_batch({"input_ids": torch.arange(LENGTH, device=device)[None]})
    assert isinstance(logits, torch.Tensor)
    state = module.state_dict_to_save()
    figures = {"logits": logits, **state["model"], **state["optim"]}
    return seen, {name: get_local_tensor(x) for name, x in figures.items() if isinstance(x, torch.Tensor)}


# FSDP rounds what enters a block to its dtype, and so the LSEs and queries of these: they are compared in fp32.
ROUNDED = ("attention_residuals", "delta_residuals")
MECHANISMS = [(name, True, None) for name in DepthMechanism.known]
FLOAT8 = [(None, True, "rowwise"), ("moda", True, "tensorwise"), ("moda", True, "rowwise")]


@pytest.mark.parametrize(("depth", "tied", "float8"), [(None, True, None), (None, False, None), *MECHANISMS, *FLOAT8])
def test_trains_as_fsdp_does(
    depth: str | None, tied: bool, float8: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float8 keys and values, of 8 columns, are in bf16."""
    section: dict[str, Any] = dict(
        d_model=16, n_layers=3, n_heads=2, n_kv_heads=1, ffn_hidden_size=48 if float8 else 24, vocab_size=VOCAB,
        tie_embeddings=tied, depth=depth and {"mechanism": depth},
    )  # fmt: skip
    options: dict[str, Any] = dict(
        rank_microbatch_size=2 * LENGTH, max_sequence_length=LENGTH, optim=AdamWConfig(lr=1e-2), max_grad_norm=1.0,
        z_loss_multiplier=1e-3,
    )  # fmt: skip
    dtype = DType.float32 if depth in ROUNDED else DType.bfloat16
    own = OneProcessTrainModule(_build(section, float8), half=dtype.as_pt(), device=CPU, **options)
    found = _train(own)
    assert found[1]["logits"].dtype == dtype.as_pt()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in own.model.parameters())

    monkeypatch.setattr(olmo_core.distributed.parallel, "_WORLD_MESH", None)  # it builds one per process
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = TransformerDataParallelConfig(
            name=DataParallelType.fsdp, param_dtype=dtype, reduce_dtype=DType.float32
        )
        build = TransformerTrainModuleConfig(dp_config=sharded, **options).build
        expected = _train(cast(TransformerTrainModule, build(_build(section, float8), device=CPU)))
    finally:
        dist.destroy_process_group()
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0, msg=name)


class _Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: operations are noted with their tensors, and done again on these very tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for to, new in zip(tree_leaves(out), tree_leaves(again)):
                    if isinstance(to, torch.Tensor) and to.data_ptr() != new.data_ptr():
                        to.copy_(new)


@contextlib.contextmanager
def _capturing(tape: _Tape, module: OneProcessTrainModule, **options: Any) -> Iterator[None]:
    """Nothing is done while a graph is captured: undo it."""
    before = {p: p.grad.clone() for p in module._trained if p.grad is not None}
    assert len(before) == len(module._trained)
    with tape:
        yield
    for p, grad in before.items():
        assert p.grad is not None
        p.grad.copy_(grad)


@pytest.mark.parametrize(
    "batch, float8", [(2, None), (4, None), (6, None), (10, None), (6, "tensorwise"), (6, "rowwise")],
    ids=lambda x: f"{x // 2} microbatches" if isinstance(x, int) else str(x),
)  # fmt: skip
def test_what_a_graph_replays_is_a_step(batch: int, float8: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    section: dict[str, Any] = dict(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_hidden_size=48 if float8 else 24, vocab_size=VOCAB,
        tie_embeddings=True,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.cuda.Stream(CPU))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Tape)
    runs = []
    for graph in (False, True):
        module = _one_process(section, float8, graph, CPU)
        monkeypatch.setattr(torch.cuda, "graph", functools.partial(_capturing, module=module))
        runs.append(_train(module, steps=6, batch=batch))
        assert (module._graph is not None) == graph
    tape: Any = module._graph
    assert not any("_local_scalar_dense" in str(func) for func, *_ in tape.calls), "the host would wait for the GPU"
    assert runs[1][0] == runs[0][0]
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("float8", [None, "tensorwise", "rowwise"])
@pytest.mark.parametrize("depth", [None, "moda", "denseformer", "mudd", "attention_residuals", "delta_residuals"])
def test_a_graph_adds_up_microbatches(depth: str | None, float8: str | None) -> None:
    """Steps of three microbatches, of which the dry one's warm up: every later one is replayed."""
    section: dict[str, Any] = dict(
        d_model=64, n_layers=3, n_heads=2, n_kv_heads=1, ffn_hidden_size=96, vocab_size=VOCAB, tie_embeddings=True,
        depth=depth and {"mechanism": depth}, attention_backend="reference", norm_placement="pre",
    )  # fmt: skip
    device = torch.device("cuda")
    if float8 is not None and (reason := fp8_missing(device)) is not None:
        pytest.skip(reason)
    runs = []
    for graph in (False, True):
        module = _one_process(section, float8, graph, device)
        runs.append(_train(module, steps=5, batch=6, device=device, same=True)[0])
        assert (module._graph is not None) == graph
    for eager, replayed in zip(*runs):
        assert replayed == pytest.approx(eager, rel=1e-3), "kernels that add in any order"
    assert runs[0][-1]["loss"] < 0.9 * runs[0][0]["loss"], "a batch that is seen again is learned"
