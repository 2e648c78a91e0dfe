"""The loss without logits is the plain one's: exactly in fp64, by the yardstick in bf16, compiled, sharded, in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from olmo_core.nn.lm_head import LMHead, LMOutputWithLoss
from torch import Tensor

from moda.config.model import ModelConfig
from moda.model import loss as module
from moda.model import transformer_config
from moda.model.loss import chunk_rows, linear_cross_entropy
from moda_kernels.cross_entropy import cross_entropy_
from moda_kernels.yardstick import report, verdicts

N, D, VOCAB, ROWS, Z = 41, 24, 50, 64, 1e-2


def inputs(dtype: torch.dtype, rows: int = ROWS, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, D, generator=g).to(device, dtype) for n in (N, rows))
    labels = torch.randint(0, VOCAB, (N,), generator=g).to(device)
    labels[[0, 7, 8, N - 1]] = -100
    labels[3] = VOCAB - 1
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Everything from the logits."""
    logits = (hidden @ weight[:VOCAB].T).to(torch.promote_types(hidden.dtype, torch.float32))
    ce = F.cross_entropy(logits, labels, reduction="none")
    z = Z * logits.logsumexp(1) ** 2 * (labels != -100)
    out = {"loss": (ce + z).sum(), "ce": ce, "z": z}
    return {**out, **dict(zip(("hidden", "weight"), torch.autograd.grad(3 * out["loss"], (hidden, weight))))}


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss, ce, z = linear_cross_entropy(hidden, weight, labels, vocab=VOCAB, z_loss=Z)
    assert not ce.requires_grad and not z.requires_grad
    grads = torch.autograd.grad(3 * loss, (hidden, weight))
    return {"loss": loss, "ce": ce, "z": z, "hidden": grads[0], "weight": grads[1]}


@pytest.fixture(params=[1, 16, 41, 64])
def rows_of_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_rows", lambda *_: request.param)


@pytest.mark.usefixtures("rows_of_a_chunk")
@pytest.mark.parametrize("rows", [ROWS, VOCAB], ids=["padded", "unpadded"])
def test_it_is_the_plain_loss(rows: int) -> None:
    truth, result = (f(*inputs(torch.float64, rows)) for f in (plain, chunked))
    for name, exact in truth.items():
        torch.testing.assert_close(result[name], exact, rtol=1e-12, atol=1e-12)
    assert not result["weight"][VOCAB:].any() and not result["hidden"][[0, 7, 8, N - 1]].any()


def _judge(dtype: torch.dtype, device: str) -> None:
    """Eight draws together: a loss is one number, and the plain one's rounding can be nothing by chance."""
    results: dict[str, list[dict[str, Tensor]]] = {"chunked": [], "plain": [], "truth": []}
    for seed in range(8):
        given = inputs(dtype, device=device, seed=seed)
        hidden, weight = (x.detach().double().requires_grad_() for x in given[:2])
        results["chunked"].append(chunked(*given))
        results["plain"].append(plain(*given))
        results["truth"].append(plain(hidden, weight, given[2]))
    stacked = {who: {k: torch.stack([draw[k] for draw in draws]) for k in draws[0]} for who, draws in results.items()}
    judged = verdicts(stacked["chunked"], stacked["plain"], stacked["truth"])
    assert all(v.passed for v in judged), report(judged)


@pytest.mark.usefixtures("rows_of_a_chunk")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_by_the_yardstick(dtype: torch.dtype) -> None:
    _judge(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("rows_of_a_chunk")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_by_the_yardstick_on_a_gpu(dtype: torch.dtype) -> None:
    _judge(dtype, "cuda")


def test_the_head_is_olmo_cores_with_every_reduction() -> None:
    """Against OLMo-core's own head on the same weights: losses, and gradients of a tied matrix that also embeds."""
    ids = torch.randint(0, 211, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.3, -100)
    for reduction, factor in (("sum", torch.tensor(13.0)), ("mean", None), ("none", None)):
        seen: list[tuple[LMOutputWithLoss, list[Tensor]]] = []
        for head in (None, LMHead.forward):
            model = transformer_config(ModelConfig(64, 2, 4, 96, vocab_size=211, pad_vocab_to=128)).build().double()
            model.init_weights(max_seq_len=64, device=torch.device("cpu"))
            if head is not None:
                model.lm_head.forward = head.__get__(model.lm_head)
            options: dict[str, Any] = dict(loss_reduction=reduction, z_loss_multiplier=1e-3, loss_div_factor=factor)
            with torch.set_grad_enabled(reduction != "none"):
                out = model(ids, labels=labels, return_logits=False, **options)
            if reduction != "none":
                out.loss.backward()
            seen.append((out, [p.grad for p in model.parameters() if p.grad is not None]))
        (ours, grads), (theirs, their_grads) = seen
        for a, b in zip((*ours[1:], *grads), (*theirs[1:], *their_grads), strict=True):
            assert a.shape == b.shape
            if reduction == "none":  # OLMo-core's has a z-loss for ignored tokens
                b = b * (labels != -100)
            # OLMo-core computes the loss in fp32.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_losses_per_token_come_with_logits_unless_switched_off() -> None:
    head: Any = transformer_config(ModelConfig(64, 1, 4, 96, vocab_size=211, pad_vocab_to=128)).build().lm_head
    torch.nn.init.normal_(head.w_out.weight, std=0.1)
    x, labels = torch.randn(2, 9, 64), torch.randint(0, 211, (2, 9))
    with torch.no_grad():
        whole = head(x, labels=labels, loss_reduction="none")
        head.logits_with_losses = False
        bare = head(x, labels=labels, loss_reduction="none")
    assert whole.logits.shape == (2, 9, 211) and bare.logits is None
    torch.testing.assert_close(whole.ce_loss, bare.ce_loss)


def test_no_gradients_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(torch.float32)
    asked = []

    def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        asked.append(kwargs["gradient"])
        return cross_entropy_(*args, **kwargs)

    monkeypatch.setattr(module, "cross_entropy_", watched)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels, vocab=VOCAB)[0]
    assert asked == [False] and not loss.requires_grad
    linear_cross_entropy(hidden, weight.detach(), labels, vocab=VOCAB)[0].backward()  # a frozen head
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_it_compiles_without_a_graph_break(autocast: bool) -> None:
    def step(f: Any) -> list[Tensor]:
        head = transformer_config(ModelConfig(64, 1, 4, 96, vocab_size=211, pad_vocab_to=128)).build().lm_head
        torch.nn.init.normal_(head.w_out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = f(head)(x, labels=torch.arange(18).view(2, 9), z_loss_multiplier=1e-3, return_logits=False)
        out.loss.backward()
        assert x.grad is not None and head.w_out.weight.grad is not None
        return [out.loss, out.ce_loss, out.z_loss, x.grad, head.w_out.weight.grad]

    torch.compiler.reset()
    compiled = step(lambda head: torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=True))
    for a, b in zip(compiled, step(lambda head: head)):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_its_peak_at_full_size() -> None:
    """At most 1 GiB beyond hidden states, head and both gradients."""
    weight = torch.randn(100_352, 1024, device="cuda").to(torch.bfloat16).requires_grad_()
    hidden = torch.randn(32_768, 1024, device="cuda").to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 100_278, (32_768,), device="cuda")
    linear_cross_entropy(hidden[:4096], weight, labels[:4096], vocab=100_278, z_loss=1e-5)  # loads the kernels
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, labels, vocab=100_278, z_loss=1e-5)[0].backward()
    gradients = hidden.nbytes + weight.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= 2**30


def test_a_chunk_fits_its_memory() -> None:
    for d_model in (1024, 1536):
        rows = chunk_rows(d_model, 100_352, 2)
        assert rows >= 1024 and 100_352 * (2 * rows + 4 * d_model) <= module.LOSS_BYTES
    assert chunk_rows(8192, 2**18, 2) == 256
