"""Continuations that share the run of their context score as they do alone, in every kind of model that can share."""

from __future__ import annotations

import random

import pytest
import torch

from moda.config.schema import ModelConfig
from moda.model import transformer_config
from moda.typed import from_dict
from moda_evals import scoring
from moda_evals.model import ScoredModel
from moda_evals.shared_prefix import MAX_ROW, Tree, can_share, grow, lay_out
from tests.small_checkpoint import MODEL, randomise

VOCAB = 61
VARIANTS = {
    "moda": {},
    "no-rope": {
        "depth": {"mechanism": "moda", "attention": "project", "ffn": True, "rope": "none", "key_norm": "reader"}
    },
    "reader": {"depth": {"mechanism": "moda", "attention": "reuse", "ffn": True, "key_norm": "reader"}},
    "value-residual": {"depth": {"mechanism": "value_residual"}},
    "denseformer": {"depth": {"mechanism": "denseformer"}},
    "depth-attention": {"depth": {"mechanism": "depth_attention", "stride": 1}},
    "depth-only": {"depth": {"mechanism": "depth_only"}},
    "delta": {"depth": {"mechanism": "delta_residuals"}, "norm_placement": "pre"},
    "plain-post": {"depth": None},
    "olmo2": {"depth": None, "norm_placement": "reordered"},
    "operator": {"depth": None, "attention_backend": "reference"},
}


def make_model(**changes) -> ScoredModel:
    config = from_dict(ModelConfig, {**MODEL, "pad_vocab_to": 1, "vocab_size": VOCAB, **changes})
    module = randomise(transformer_config(config, VOCAB).build(init_device="cpu"), 3).eval()
    return ScoredModel("m", "m", "moda", None, 512, VOCAB, module=module, head=module.lm_head)


def make_spans(seed: int = 0) -> list[scoring.Span]:
    """Questions with one to five choices of different lengths, contexts that are prefixes of others, and equal choices."""
    rng = random.Random(seed)
    base = [rng.randrange(VOCAB) for _ in range(40)]
    spans = []
    for question in range(9):
        context = base[: 5 + 4 * question]
        for _ in range(1 + question % 5):
            tokens = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 1, 2, 7]))]
            spans.append(scoring.continuation(context, tokens))
    return spans


@pytest.mark.parametrize("name", list(VARIANTS))
def test_scores_are_those_of_separate_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(**VARIANTS[name])
    if name == "operator":  # trees go through SDPA: in fp32 the two would differ by their roundings
        model.module.double()
    assert can_share(model.module)
    spans = make_spans()
    together = scoring.score(model, spans, batch_tokens=256)
    monkeypatch.setattr(scoring, "can_share", lambda module: False)
    alone = scoring.score(model, spans, batch_tokens=1)
    assert together.tokens - together.padded < 0.8 * (alone.tokens - alone.padded)
    for a, b in zip(together.log_probs, alone.log_probs, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=2e-5)


def test_nothing_stays_on_the_model() -> None:
    model = make_model()
    ids = torch.randint(0, VOCAB, (2, 9))
    before = model.logits(ids)
    scoring.score(model, make_spans(), batch_tokens=256)
    assert torch.equal(model.logits(ids), before)


def test_a_compiled_model_does_not_share() -> None:
    module = make_model().module
    module.apply_compile()
    assert not can_share(module)
    assert not can_share(torch.nn.Linear(2, 2))


def test_trees() -> None:
    tree = Tree((1, 2, 3), ((4, 5), (), (6,)))
    assert tree.length == 6 and tree.sequences == [(1, 2, 3, 4, 5), (1, 2, 3), (1, 2, 3, 6)]
    assert tree.columns(0, 2, 3) == [2, 3, 4] and tree.columns(2, 2, 2) == [2, 5] and tree.columns(1, 2, 1) == [2]
    layout = lay_out([tree, Tree((7,), ((),))], 4)
    assert layout.ids[0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert layout.positions[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    seen = layout.mask(torch.device("cpu"))[0]
    assert seen[4].tolist() == [True] * 5 + [False] * 3
    assert seen[5].tolist() == [True] * 3 + [False, False, True, False, False]
    assert not layout.is_plain and lay_out([Tree((7,), ((),))]).is_plain


def test_what_is_not_worth_sharing_runs_alone() -> None:
    long = tuple(range(MAX_ROW // 2))
    rows = [(1, *long), (1, *long, 5), (2, 3, 4, 5, 6, 7, 8), (2, 9, 9, 9, 9, 9, 9)]
    trees = grow(rows, [1, 1, 1, 1], True)
    assert all(len(t.leaves) == 1 for t in trees) and sorted(s for t in trees for s in t.sequences) == sorted(rows)
    shared = grow([(1, 2, 3, 4), (1, 2, 3, 5)], [3, 3], True)
    assert shared == [Tree((1, 2, 3), ((4,), (5,)))]
    assert len(grow([(1, 2, 3, 4), (1, 2, 3, 5)], [3, 3], False)) == 2


def test_models_that_cannot_share() -> None:
    scaled = make_model(depth=None).module
    assert can_share(scaled)
    next(m for m in scaled.modules() if type(m).__name__ == "Attention").scalable_softmax = True
    assert not can_share(scaled)


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_what_a_hugging_face_model_does_after_its_head_counts(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    if kind == "granite":
        module = transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=8.0))
    else:
        module = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, final_logit_softcapping=0.5))
    module = randomise(module, 0).eval()
    head = module.get_output_embeddings()
    model = ScoredModel("m", "m", "huggingface", None, 512, VOCAB, module=module, head=head)
    spans = make_spans(1)
    log_probs = scoring.score(model, spans, batch_tokens=200).log_probs
    for span, ours in zip(spans, log_probs, strict=True):
        with torch.no_grad():
            logits = module(torch.tensor([span.ids])).logits[0].float().log_softmax(-1)
        truth = [logits[span.start + i, t].item() for i, t in enumerate(span.targets)]
        assert ours.tolist() == pytest.approx(truth, abs=2e-4)


@pytest.mark.parametrize("says", [True, False])
def test_a_model_of_this_project_says_itself_whether_it_shares(says: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_model().module
    monkeypatch.setattr(type(module), "shares_prefix", says, raising=False)
    assert can_share(module) is says
