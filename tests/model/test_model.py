"""The plain model is OLMo-core's, padding stays out of the softmax, packed documents stay apart, compilation is shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from olmo_core.config import Config
from olmo_core.nn.attention.backend import TorchAttentionBackend
from olmo_core.nn.transformer import Transformer, TransformerBlockType, TransformerConfig

from moda.config.model import ModelConfig
from moda.depth import DepthMechanism
from moda.model import DepthTransformer, ModelTransformerConfig, attention, transformer_config
from moda.model.attention import OperatorBackend
from moda.typed import from_dict, to_dict
from moda_kernels import sequence_kernel
from moda_kernels.yardstick import compare, report

SMALL: dict = dict(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_hidden_size=96, vocab_size=211)
MODA = {"mechanism": "moda"}


def build(seed: int = 0, **settings: Any) -> Transformer:
    model = transformer_config(ModelConfig(**{**SMALL, **settings})).build()
    model.init_seed = seed
    model.init_weights(max_seq_len=64, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("qk_norm", ["full", "head"])
def test_without_a_mechanism_it_is_olmo_cores_olmo2_bit_for_bit(qk_norm: str, tied: bool) -> None:
    ours = build(qk_norm=qk_norm, tie_embeddings=tied)
    theirs = TransformerConfig.llama_like(
        d_model=64,
        vocab_size=211,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        hidden_size_multiple_of=96,
        hidden_size_multiplier=0.5,
        block_name=TransformerBlockType.reordered_norm,
        qk_norm=True,
        use_head_qk_norm=qk_norm == "head",
        layer_norm_eps=1e-6,
        tie_word_embeddings=tied,
    ).build()
    assert type(ours) is Transformer and ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 211, (2, 33))
    a, b = (model(ids, labels=ids, return_logits=True) for model in (ours, theirs))
    assert torch.equal(a.logits, b.logits)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad), name


def test_initialisation_is_truncated_normal_and_seeded() -> None:
    a, b, c = (
        build(0, depth=MODA),
        build(0, depth=MODA),
        build(1, depth=MODA),
    )
    differ = False
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), c.parameters()):
        assert torch.equal(p, q), name
        if p.ndim == 2:
            assert p.abs().max() <= 0.06 and abs(p.std().item() / 0.02 - 1) < 0.05, name
            differ |= not torch.equal(p, r)
    assert differ


def test_vocabulary_padding_stays_out_of_the_softmax() -> None:
    padded, plain = build(pad_vocab_to=128), build()
    assert padded.embeddings.weight.shape[0] == 256
    state = plain.state_dict()
    noise = torch.full((45, 64), 7.0)
    for name in ("embeddings.weight", "lm_head.w_out.weight"):
        state[name] = torch.cat([state[name], noise])
    padded.load_state_dict(state)
    ids = torch.randint(0, 211, (2, 9))
    a, b = (model(ids, labels=ids, return_logits=True) for model in (padded, plain))
    assert a.logits.shape[-1] == 211
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)
    a.loss.backward()
    assert not padded.embeddings.weight.grad[211:].any()


@pytest.mark.parametrize(
    "depth",
    [{"mechanism": name} for name in DepthMechanism.known]
    + [{"mechanism": "moda", "key_norm": "reader"}, {"mechanism": "moda", "read": {"learned": 2}}],
    ids=str,
)
def test_packed_documents_do_not_see_each_other(depth: dict[str, Any]) -> None:
    model = build(depth=depth, norm_placement="pre")
    for name, p in model.named_parameters():
        if name.endswith("scores"):  # they start at zero
            torch.nn.init.normal_(p, std=3.0)
    first, second = torch.randint(0, 211, (1, 5)), torch.randint(0, 211, (1, 7))
    apart = torch.cat([model(first), model(second)], dim=1)
    lengths = torch.tensor([[5, 7]], dtype=torch.int32)
    together = model(torch.cat([first, second], dim=1), doc_lens=lengths, max_doc_lens=[7])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    row_pair = torch.cat([first, second], dim=1).view(2, 6)  # boundaries need not fall on row ends
    over_rows = model(row_pair, doc_lens=torch.tensor([[5, 1], [6, 0]], dtype=torch.int32), max_doc_lens=[6])
    torch.testing.assert_close(over_rows.view(1, 12, -1)[:, :5], apart[:, :5], rtol=1e-4, atol=1e-5)


def test_gradient_accumulation_equals_one_batch() -> None:
    model = build(depth=MODA).double()
    ids = torch.randint(0, 211, (4, 16))

    def grads(chunks: int) -> list:
        model.zero_grad()
        for part in ids.chunk(chunks):
            out = model(part, labels=part, loss_reduction="sum", loss_div_factor=64.0)
            out.loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for a, b in zip(grads(1), grads(4)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the rotation and norms compute in fp32


def test_configuration_round_trips() -> None:
    model = ModelConfig(**SMALL, depth=MODA, pad_vocab_to=128)
    assert from_dict(ModelConfig, to_dict(model)) == model
    config = transformer_config(model)
    again = Config.from_dict(config.as_config_dict())
    assert isinstance(again, ModelTransformerConfig) and again.num_params == config.num_params
    assert isinstance(again.build(init_device="meta"), DepthTransformer)


def test_parallelism_that_would_split_a_mechanism_is_refused() -> None:
    with pytest.raises(Exception, match="pipeline parallelism: its state would have to cross stages"):
        build(depth=dict(mechanism="value_residual")).apply_pp(None)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="wrapping strategies full and blocks"):
        build(depth=MODA).apply_fsdp(wrapping_strategy="fine_grained")


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_a_plain_model_runs_the_operator_that_is_asked_for(backend: str) -> None:
    """Its logits and gradients are those of OLMo-core's own attention."""
    own = build()
    operator = build(attention_backend=backend)
    assert [type(b.attention.backend) for b in own.blocks.values()] == 3 * [TorchAttentionBackend]
    ids = torch.randint(0, 211, (2, 9))
    for model in (own, operator):
        model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(operator(ids), own(ids), rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(operator.named_parameters(), own.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(AssertionError, match="document masks"):
        operator.blocks["0"].attention.backend(3 * (ids,), cu_doc_lens=ids)


@pytest.mark.parametrize("kernel", ["flash_attn_4", "cudnn"])
def test_auto_is_flash_attention_4_or_olmo_cores_own(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    asked = []

    def sequence_kernel(*kind: Any) -> str:
        asked.append(kind)
        return kernel

    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        gpu.setattr(torch.cuda, "current_device", lambda: 1)
        gpu.setattr(attention, "sequence_kernel", sequence_kernel)
        backends = [
            block.attention.backend for block in transformer_config(ModelConfig(**SMALL)).build().blocks.values()
        ]
    assert asked == 3 * [(torch.device("cuda", 1), torch.bfloat16, 16)]
    assert {type(b) for b in backends} == {OperatorBackend if kernel == "flash_attn_4" else TorchAttentionBackend}
    qkv = tuple(torch.randn(1, 5, heads, 16) for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "moda_attention", None)  # what is not in half precision on a GPU stays OLMo-core's
    own = TorchAttentionBackend(head_dim=16, n_heads=4, n_kv_heads=2)
    assert torch.equal(backends[0](qkv), own(qkv))


def test_head_dims_that_the_operator_does_not_take_stay_olmo_cores() -> None:
    assert sequence_kernel(torch.device("cpu"), torch.bfloat16, 6) is None
    assert sequence_kernel(torch.device("cpu"), torch.bfloat16, 288) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_plain_model_with_flash_attention_4() -> None:
    """Compiled, in bf16, no further from fp64 than OLMo-core's own attention is."""
    device = torch.device("cuda", 0)
    if sequence_kernel(device, torch.bfloat16, 64) != "flash_attn_4":
        pytest.skip("FlashAttention 4 is not installed here")
    ids = torch.randint(0, 211, (2, 200), device=device)
    results = []
    for dtype, own in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float64, True)):
        model = build(head_dim=64).to(device)
        for p in model.parameters():
            p.data = p.data.bfloat16().to(dtype)
        for block in model.blocks.values():
            assert isinstance(block.attention.backend, OperatorBackend)
            if own:
                block.attention.backend = TorchAttentionBackend(head_dim=64, n_heads=4, n_kv_heads=2)
            else:
                block.compile(fullgraph=True)
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in model.parameters())])
    verdicts = [compare(str(i), *tensors) for i, tensors in enumerate(zip(*results, strict=True))]
    assert all(v.passed for v in verdicts), report(verdicts)


SHARED = [name for name in DepthMechanism.known if name != "hyper_connections"]


@pytest.mark.parametrize("mechanism", [*SHARED, None, "learned"])  # without the one whose layers are those of mhc
def test_blocks_share_compiled_graphs(mechanism: str | None) -> None:
    """No graph breaks, and at most two graphs for six layers: the first or the last layer may differ from the others."""
    from torch._dynamo.utils import counters

    options: dict[str, Any] = {"iterations": 2} if mechanism == "mhc" else {}
    graphs = 2
    if mechanism == "learned":  # the first layer has no scores, the last layer writes nothing
        mechanism, options, graphs = "moda", {"read": {"learned": 2}}, 3
    depth = None if mechanism is None else {"mechanism": mechanism, **options}
    backend = "auto" if depth else "reference"
    model = build(depth=depth, attention_backend=backend, n_layers=6, norm_placement="pre")
    ids = torch.randint(0, 211, (2, 9))
    eager = model(ids, labels=ids, return_logits=True)
    eager.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    counters.clear()
    for block in model.blocks.values():
        block.compile(fullgraph=True, backend="aot_eager")
    model._compile_enabled = True  # as apply_compile does, which also asks for a C++ compiler
    out = model(ids, labels=ids, return_logits=True)
    out.loss.backward()
    assert counters["stats"]["unique_graphs"] <= graphs
    torch.testing.assert_close(out.logits, eager.logits)
    for g, p in zip(gradients, model.parameters()):
        torch.testing.assert_close(p.grad, g)
