"""Parameter counts and FLOPs: the paper's digits, from the configuration files, and the built models'."""

from __future__ import annotations

from pathlib import Path

import pytest

from moda.config import RunConfig, load_config
from moda.config.model import ModelConfig
from moda.model import ModelTransformerConfig, transformer_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VOCAB = 50280  # where a configuration leaves the vocabulary to its tokenizer

# Counts worked out by hand for the built models, and what the paper prints (Table 3, Table 6), in millions; None where it
# prints nothing that our reading could be checked against (the 1.5B pair) or counts a projection more (FFN KV of Table 6).
EXACT = {
    "olmo2_700m_36l": (669_045_760, "669.0"),
    "olmo2_700m": (700_510_208, "700.5"),
    "moda_700m_depth_kv": (669_045_760, "669.0"),
    "moda_700m": (705_745_920, "705.7"),
    "moda_700m_projected": (742_446_080, "742.4"),
    "olmo2_1.5b": (1_499_031_552, None),
    "moda_1.5b": (1_510_817_280, None),
    "table6/48l_pre_olmo2": (123_384_192, "123.38"),
    "table6/48l_post_depth_kv": (123_384_192, "123.38"),
    "table6/48l_post_ffn_kv": (128_016_512, None),
    "table6/24l_post_olmo2": (71_350_656, "71.35"),
    "table6/24l_pre_ffn_kv": (73_617_536, None),
}
TABLE_3_FLOPS = {  # forward, one sequence of 4096 tokens, in T
    "olmo2_700m_36l": 8.01,
    "olmo2_700m": 8.41,
    "moda_700m_depth_kv": 8.02,
    "moda_700m": 8.33,
    "moda_700m_projected": 8.63,
}
TABLE_6_FLOPS = {"table6/24l_post_olmo2": 78.19, "table6/48l_post_olmo2": 136.61}  # one sequence of 512 tokens, in G


def transformer(name: str) -> ModelTransformerConfig:
    config: RunConfig = load_config(CONFIGS / f"{name}.yaml")
    return transformer_config(config.model, VOCAB)


def by_hand(model: ModelConfig, vocab: int) -> int:
    """Parameters by the equations of an OLMo2 decoder, written out apart from the code."""
    d, width, kv = model.d_model, model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim  # type: ignore[operator]
    b = int(model.bias)
    attention = 2 * d * width + 2 * d * kv + b * (width + 2 * kv + d)
    qk_norm = 2 * model.head_dim if model.qk_norm.value == "head" else width + kv  # type: ignore[operator]
    ffn = 3 * d * model.ffn_hidden_size + b * (2 * model.ffn_hidden_size + d)
    total = vocab * d * (1 if model.tie_embeddings else 2) + d + model.n_layers * (attention + qk_norm + ffn + 2 * d)
    if model.depth is not None:
        options = model.depth.to_plain()
        pairs = int(options["ffn"]) + int(options["attention"] == "project")
        total += (model.n_layers - 1) * pairs * 2 * (d * kv + b * kv)
    return total


@pytest.mark.parametrize("name", EXACT)
def test_parameter_counts(name: str) -> None:
    count, printed = EXACT[name]
    config = transformer(name)
    assert config.num_counted_params == count == by_hand(config.model, config.vocab_size - config.lm_head.padding)
    if printed is not None:  # to the last digit that the paper prints
        digits = len(printed.split(".")[1])
        assert f"{config.num_counted_params / 1e6:.{digits}f}" == printed


def test_table_6_with_the_projection_that_nothing_reads() -> None:
    one_more = 2 * (384 * 128 + 128)  # the paper's count has a projection in the last layer too
    for layers, printed in ((48, 128.11), (24, 73.72)):
        count = transformer(f"table6/{layers}l_post_ffn_kv").num_counted_params + one_more
        assert abs(count / 1e6 - printed) < 0.01


@pytest.mark.parametrize("name", TABLE_3_FLOPS)
def test_table_3_flops(name: str) -> None:
    ours = transformer(name).paper_forward_flops(4096) / 1e12
    assert abs(ours / TABLE_3_FLOPS[name] - 1) < 0.015


@pytest.mark.parametrize("name", TABLE_6_FLOPS)
def test_table_6_flops(name: str) -> None:
    ours = transformer(name).paper_forward_flops(512, causal=True) / 1e9
    assert abs(ours / TABLE_6_FLOPS[name] - 1) < 0.015


def test_demo_and_its_baseline_match_within_a_percent() -> None:
    demo, baseline = transformer("moda_demo"), transformer("olmo2_demo")
    assert abs(demo.num_counted_params / baseline.num_counted_params - 1) < 0.01


FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.relative_to(CONFIGS).parts[0] not in ("base", "sweeps"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_configuration_builds_what_it_counts(path: Path) -> None:
    config = load_config(path)
    t = transformer_config(config.model, VOCAB)
    model = t.build(init_device="meta")
    length = config.train.sequence_length
    assert sum(p.numel() for p in model.parameters()) == t.num_params
    assert model.num_flops_per_token(length) == t.num_flops_per_token(length)
    assert config.optim.warmup_steps < config.train.steps


def test_every_base_is_used() -> None:
    used = {line.split("base:")[1].strip().split("/")[-1] for p in FILES for line in p.read_text().splitlines()
            if line.startswith("base:")}  # fmt: skip
    assert {p.name for p in (CONFIGS / "base").glob("*.yaml")} <= used


def test_recipe_is_the_400b_one() -> None:
    config = load_config(CONFIGS / "moda_1.5b.yaml")
    assert config.train.steps == 95_368
    assert config.train.tokens_per_step == 4_194_304
