"""Mechanisms at the residual stream against lists of tensors written out from their papers' equations, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from olmo_core.nn.transformer import TransformerActivationCheckpointingMode

from moda.config import load_config
from moda.config.model import ModelConfig
from moda.errors import UserError
from moda.model import transformer_config
from moda_kernels.sources import Sources, fastest
from moda_kernels.yardstick import report, verdicts
from tests.model.test_against_plain import SMALL, TOLERANCE, build
from tests.plain_model import PLACEMENTS, PlainDecoder, rms
from tests.test_extending import known_everywhere
from tests.tiny import ROOT

Weights = dict[str, torch.Tensor]
SUBLAYERS = ("attention", "feed_forward")


def placed(decoder: PlainDecoder, sublayer: str, layer: int, x: torch.Tensor) -> torch.Tensor:
    """A sublayer's output in pre- and peri-norm, its norms included."""
    f = decoder.attention if sublayer == "attention" else decoder.ffn
    out = f(rms(x, decoder.p[f"blocks.{layer}.{sublayer}_norm.weight"]), layer)
    return rms(out, decoder.p[f"blocks.{layer}.post_{sublayer}_norm.weight"]) if decoder.placement == "peri" else out


def hyper_connections(d: PlainDecoder, ids: torch.Tensor, n: int, dynamic: bool) -> torch.Tensor:
    streams = [d.p["embeddings.weight"][ids]] * n
    for layer in range(d.n_layers):
        for sublayer in SUBLAYERS:
            name = f"blocks.{layer}.depth.connections.{sublayer}"
            a = [[d.p[f"{name}.alpha"][i, j] for j in range(1 + n)] for i in range(n)]
            b = [d.p[f"{name}.beta"][i] for i in range(n)]
            if dynamic:
                s_a, s_b = d.p[f"{name}.scales"]
                given = [torch.tanh(rms(h, None) @ d.p[f"{name}.weight"]) for h in streams]
                a = [[a[i][j] + s_a * given[i][..., j, None] for j in range(1 + n)] for i in range(n)]
                b = [b[i] + s_b * given[i][..., 1 + n, None] for i in range(n)]
            out = placed(d, sublayer, layer, sum(a[i][0] * streams[i] for i in range(n)))  # type: ignore[arg-type]
            streams = [sum(a[i][1 + j] * streams[i] for i in range(n)) + b[j] * out for j in range(n)]  # type: ignore[misc]
    return sum(streams)  # type: ignore[return-value]


def mhc(d: PlainDecoder, ids: torch.Tensor, n: int, iterations: int) -> torch.Tensor:
    streams = [d.p["embeddings.weight"][ids]] * n
    for layer in range(d.n_layers):
        for sublayer in SUBLAYERS:
            p = {key: d.p[f"blocks.{layer}.depth.connections.{sublayer}.{key}"] for key in ("phi", "b", "gates")}
            given = rms(torch.cat(streams, -1), None) @ p["phi"]
            pre = torch.sigmoid(p["gates"][0] * given[..., :n] + p["b"][:n])
            post = 2 * torch.sigmoid(p["gates"][1] * given[..., n : 2 * n] + p["b"][n : 2 * n])
            m = torch.exp(p["gates"][2] * given[..., 2 * n :] + p["b"][2 * n :]).reshape(*ids.shape, n, n)
            for _ in range(iterations):
                m = m / m.sum(-2, keepdim=True)
                m = m / m.sum(-1, keepdim=True)
            out = placed(d, sublayer, layer, sum(pre[..., i, None] * streams[i] for i in range(n)))  # type: ignore[arg-type]
            streams = [
                sum(m[..., j, i, None] * streams[i] for i in range(n)) + post[..., j, None] * out  # type: ignore[misc]
                for j in range(n)
            ]
    return sum(streams)  # type: ignore[return-value]


def attention_residuals(d: PlainDecoder, ids: torch.Tensor, blocks: int | None) -> torch.Tensor:
    length = 1 if blocks is None else 2 * d.n_layers // blocks

    def attend(values: list[torch.Tensor], name: str) -> torch.Tensor:
        keys = torch.stack([rms(v, d.p[f"{name}.gain"]) for v in values])
        p = torch.einsum("d,nbtd->nbt", d.p[f"{name}.query"], keys).softmax(0)
        return torch.einsum("nbt,nbtd->btd", p, torch.stack(values))

    finished, outputs = [d.p["embeddings.weight"][ids]], []
    for layer in range(d.n_layers):
        for sublayer in SUBLAYERS:
            values = finished + ([sum(outputs)] if outputs else [])  # type: ignore[list-item]
            x = attend(values, f"depth.readers.{2 * layer + SUBLAYERS.index(sublayer)}")
            outputs.append(placed(d, sublayer, layer, x))
            if len(outputs) == length:
                finished.append(sum(outputs))  # type: ignore[arg-type]
                outputs = []
    return attend(finished, f"depth.readers.{2 * d.n_layers}")


def delta(d: PlainDecoder, ids: torch.Tensor, blocks: int | None) -> torch.Tensor:
    total = d.p["embeddings.weight"][ids]
    embedding, outputs, finished = total, [], []  # type: ignore[var-annotated]
    for layer in range(d.n_layers):
        for sublayer in SUBLAYERS:
            sources = [embedding, *outputs] if outputs else []
            if blocks is not None:
                sources = finished
            x = total
            if sources:
                name = f"depth.readers.{2 * layer + SUBLAYERS.index(sublayer) - 1}"
                keys = torch.stack([rms(v, d.p[f"{name}.gain"]) for v in sources])
                p = torch.einsum("d,nbtd->nbt", d.p[f"{name}.query"], keys).softmax(0)
                x = total + torch.einsum("nbt,nbtd->btd", p, torch.stack(sources))
            out = placed(d, sublayer, layer, x)
            if blocks is not None and sublayer == "attention" and layer % (d.n_layers // blocks) == 0:
                finished = [*finished, sum(outputs) if outputs else embedding]
                outputs = []
            outputs.append(out)
            total = total + out
    return total


def mudd(d: PlainDecoder, ids: torch.Tensor, dynamic: bool) -> torch.Tensor:
    outputs = [d.p["embeddings.weight"][ids]]
    ways = [outputs[0]] * 4
    for layer in range(d.n_layers):
        names = [f"blocks.{layer}.{name}_norm.weight" for name in SUBLAYERS]
        names += [f"blocks.{layer}.post_{name}_norm.weight" for name in SUBLAYERS]
        norms = [d.p.get(name) for name in names]
        before = d.placement in ("pre", "peri")
        out = d.attention(tuple(rms(x, norms[0]) if before else x for x in ways[:3]), layer)
        h = PLACEMENTS[d.placement](ways[3], lambda _, out=out: out, [norms[0], norms[2]])
        outputs.append(PLACEMENTS[d.placement](h, lambda x, layer=layer: d.ffn(x, layer), [norms[1], norms[3]]))
        a = d.p[f"depth.mixers.{layer}.static"].expand(*ids.shape, -1, -1)
        if dynamic:
            hidden = rms(outputs[-1], None) @ d.p[f"depth.mixers.{layer}.w_1.weight"].T
            a = a + (torch.nn.functional.gelu(hidden) @ d.p[f"depth.mixers.{layer}.w_2"]).reshape(a.shape)
        ways = [sum(a[..., c, j, None] * x for j, x in enumerate(outputs)) for c in range(a.shape[2])]  # type: ignore[misc]
    return ways[-1]


CASES: dict[str, tuple[dict[str, Any], Any, tuple[Any, ...]]] = {
    "hyper-connections": (dict(mechanism="hyper_connections", streams=3), hyper_connections, (3, True)),
    "one stream": (dict(mechanism="hyper_connections", streams=1), hyper_connections, (1, True)),
    "static": (dict(mechanism="hyper_connections", streams=4, dynamic=False), hyper_connections, (4, False)),
    "mhc": (dict(mechanism="mhc", streams=3, iterations=5), mhc, (3, 5)),
    "attention residuals": (dict(mechanism="attention_residuals"), attention_residuals, (None,)),
    "blocks": (dict(mechanism="attention_residuals", blocks=4), attention_residuals, (4,)),
    "mudd": (dict(mechanism="mudd"), mudd, (True,)),
    "static mudd": (dict(mechanism="mudd", dynamic=False), mudd, (False,)),
    "delta": (dict(mechanism="delta_residuals"), delta, (None,)),
    "delta blocks": (dict(mechanism="delta_residuals", blocks=2), delta, (2,)),
    "one block": (dict(mechanism="attention_residuals", blocks=1), attention_residuals, (1,)),
}


@pytest.mark.parametrize(
    "case, placement",
    [(case, p) for case in CASES for p in (PLACEMENTS if CASES[case][1] is mudd else ("pre", "peri"))],
)
def test_logits_and_gradients(case: str, placement: str) -> None:
    depth, plain, options = CASES[case]
    net = build(placement, depth)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 7), generator=generator)
    logits = net(ids)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * weights).sum().backward()
    leaves = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    leaves["lm_head.w_out.weight"] = leaves["embeddings.weight"]
    sizes = {k: SMALL[k] for k in ("n_layers", "n_heads", "n_kv_heads", "head_dim")}
    decoder = PlainDecoder(leaves, placement=placement, head_norm=False, depth=None, **sizes)
    truth = rms(plain(decoder, ids, *options), leaves["lm_head.norm.weight"]) @ leaves["lm_head.w_out.weight"].T
    (truth * weights).sum().backward()
    assert (logits - truth).abs().max() < TOLERANCE * truth.abs().max()
    for name, p in net.named_parameters():
        grad = leaves[name].grad
        if grad is None:  # of a mapping that cannot matter: with one stream Sinkhorn gives 1
            assert p.grad is None or p.grad.abs().max() < TOLERANCE, name
            continue
        assert p.grad is not None and (p.grad - grad).abs().max() <= TOLERANCE * grad.abs().max().clamp(min=1.0), name


@pytest.mark.parametrize(
    "depth",
    [dict(mechanism="hyper_connections"), dict(mechanism="mhc"), dict(mechanism="mudd")],
    ids=lambda d: d["mechanism"],
)
def test_models_that_begin_as_a_plain_one(depth: dict[str, Any]) -> None:
    """Several streams stay equal, and what a sublayer reads is the plain one; norms' eps alone would see the sum's scale."""
    ids = torch.arange(12).reshape(2, 6)
    logits = []
    for mechanism in (None, depth):
        config = transformer_config(ModelConfig(norm_placement="pre", depth=mechanism, norm_eps=1e-30, **SMALL))
        net = config.build()
        net.init_weights(max_seq_len=16, device=torch.device("cpu"))
        net = net.double()
        for module in net.modules():
            if hasattr(module, "full_precision"):
                module.full_precision = False
        logits.append(net(ids))
    assert (logits[1] - logits[0]).abs().max() < 1e-6 * logits[0].abs().max()  # parameters began as fp32


@pytest.mark.parametrize(
    "overrides, error",
    [
        (["model.depth={mechanism: hyper_connections, streams: 0}"], "model.depth.streams"),
        (["model.depth={mechanism: mhc, iterations: 0}"], "model.depth.iterations"),
        (["model.depth={mechanism: attention_residuals, blocks: 3}"], "a divisor of the 8 sublayers"),
        (["model.depth={mechanism: attention_residuals}", "model.norm_placement=post"], "leaves the stream .*got post"),
        (["model.depth={mechanism: delta_residuals, blocks: 3}"], "a divisor of the 4 layers"),
        (["model.depth={mechanism: delta_residuals}", "model.norm_placement=post"], "leaves the stream to delta_"),
        (["model.depth={mechanism: depth_attention, recent: -1}"], "model.depth.recent"),
        (["model.depth={mechanism: depth_attention, stride: 0}"], "model.depth.stride"),
        (["model.depth={mechanism: mudd, read: all}"], "it is an option of moda, depth_only"),
        (["model.depth={mechanism: mhc, dynamic: true}"], "it is an option of hyper_connections, mudd"),
    ],
)
def test_what_cannot_be(overrides: list[str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        load_config(ROOT / "configs" / "moda_demo.yaml", overrides)


@pytest.mark.parametrize(
    "depth",
    [
        "hyper_connections",
        "hyper_connections, dynamic: false",
        "mhc",
        "attention_residuals",
        "attention_residuals, blocks: 2",
        "delta_residuals",
        "delta_residuals, blocks: 1",
        "depth_attention",
        "depth_attention, stride: 1",
        "depth_only",
        "depth_only, ffn: false, key_norm: reader",
        "mudd",
        "mudd, dynamic: false",
    ],
)
def test_known_everywhere(depth: str) -> None:
    known_everywhere([f"model.depth={{mechanism: {depth}}}"], depth.split(",")[0])


MODES: dict[str, dict[str, Any]] = {
    "full": dict(mode=TransformerActivationCheckpointingMode.full),
    # A glob's * has dots in it: these are connections as well as sublayers.
    "sublayers": dict(
        mode=TransformerActivationCheckpointingMode.selected_modules,
        modules=["blocks.*.attention", "blocks.*.feed_forward"],
    ),
    "mechanism": dict(mode=TransformerActivationCheckpointingMode.selected_modules, modules=["blocks.*.depth"]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["hyper-connections", "mhc", "blocks", "mudd", "delta", "delta blocks"])
def test_activation_checkpointing(case: str, mode: str) -> None:
    net, other = build("pre", CASES[case][0]), build("pre", CASES[case][0])
    other.apply_activation_checkpointing(**MODES[mode])
    ids = torch.arange(14).reshape(2, 7)
    grads = []
    for model in (net, other):
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for ours, truth in zip(*grads):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


def read_plainly(weights: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """What two queries ``[2, d]`` get of the sources, with the LSE beside it."""
    logits = torch.einsum("cd,nbtd->cbtn", weights, torch.stack([rms(x, None) for x in sources]))
    out = torch.einsum("cbtn,nbtd->cbtd", logits.softmax(-1), torch.stack(sources))
    return torch.cat([out, logits.logsumexp(-1, keepdim=True).to(out.dtype)], dim=-1)


def written(sources: tuple[torch.Tensor, ...]) -> Sources:
    stream = Sources(len(sources), fastest, sources[0].device)
    for x in sources:
        stream.write(x)
    return stream


def read_together(weights: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    out, lse = map(
        torch.stack, written(sources).attend(weights.to(torch.promote_types(weights.dtype, torch.float32)), 1e-6)
    )
    return torch.cat([out, lse[..., None].to(out.dtype)], dim=-1)


def mix_together(weights: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    return torch.stack(written(sources).mix(weights))


def mix_plainly(weights: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    return torch.stack([sum(w[..., None] * x for w, x in zip(way.unbind(-1), sources)) for way in weights.unbind(2)])  # type: ignore[misc]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "ours, plain, shape",
    [(read_together, read_plainly, (2, 64)), (mix_together, mix_plainly, (2, 16, 4, 20))],
    ids=["read", "mix"],
)
def test_sources_in_half_precision(ours: Any, plain: Any, shape: tuple[int, ...], device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in (shape, *[(2, 16, 64)] * 20)]

    def run(f: Any, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = f(*leaves)
        seed = torch.sin(torch.arange(out.numel(), device=device)).view_as(out).to(dtype)
        weights, *sources = torch.autograd.grad(out, leaves, seed)
        return {"out": out.detach(), "weights": weights, "sources": torch.stack(sources)}

    judged = verdicts(run(ours, torch.bfloat16), run(plain, torch.bfloat16), run(plain, torch.float64))
    assert all(v.passed for v in judged), report(judged)
