"""Exported models against the models they come from: logits, cache, generation, and the way back."""

from __future__ import annotations

import ast
import itertools
import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import DynamicCache

from moda.checkpoints import load_model, open_checkpoint, read_weights
from moda.depth import DepthMechanism
from moda.errors import UserError
from moda.generate import load_decoder
from moda.hf import section_of, to_hf, write_checkpoint, write_export
from moda.hf.bundle import _imports, bundle
from moda.hf.configuration_moda import MoDAConfig
from moda.hf.modeling_moda import MoDAForCausalLM
from moda.model import transformer_config
from moda.placements import NormPlacement
from moda.typed import to_dict
from moda_evals.model import open_model
from tests.model.test_slot_policies import READS
from tests.small_checkpoint import MODEL, randomise, run_config, save_checkpoint
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(4))

TOLERANCE = 1e-9  # fp64, where a difference of the formulas cannot hide behind rounding


def config_of(**changes: Any) -> dict[str, Any]:
    return {**MODEL, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": 61, "n_layers": 4, **changes}


def pair(model: dict[str, Any], **options: Any) -> tuple:
    """A native model with random weights and the exported decoder with the same, in fp64; ``options`` are its configuration's."""
    config = transformer_config(run_config(Path("unused"), model).model, 61)
    native = randomise(config.build(init_device="cpu"), 3).eval().double()
    for module in native.modules():  # norms and rotations compute in fp32 unless told otherwise
        if hasattr(module, "full_precision"):
            module.full_precision = False
    weights = {n: p.detach() for n, p in native.named_parameters(remove_duplicate=False)}
    section = to_dict(section_of(config))
    exported = MoDAForCausalLM(MoDAConfig(model=section, max_position_embeddings=64, **options)).eval().double()
    exported.load_state_dict(to_hf(weights, 61))
    return native, exported


def check(model: dict[str, Any]) -> None:
    native, exported = pair(model)
    with torch.no_grad():
        truth, found = native(IDS), exported(IDS).logits
        assert found.shape == (2, 9, 61)
        assert (truth - found).abs().max() < TOLERANCE
        cache, steps = DynamicCache(), []
        for a, b in ((0, 4), (4, 5), (5, 9)):
            steps.append(exported(IDS[:, a:b], past_key_values=cache, use_cache=True).logits)
        assert (torch.cat(steps, dim=1) - found).abs().max() < TOLERANCE


VARIANTS = [
    dict(attention=a, ffn=f, key_norm=n, rope=r)
    for a, f, n, r in itertools.product(
        ("reuse", "project"), (True, False), ("writer", "reader", "none"), ("same_position", "none")
    )
]


@pytest.mark.parametrize("depth", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_depth_variant(depth: dict[str, Any]) -> None:
    for qk_norm in ("full", "head"):
        check(config_of(depth=dict(mechanism="moda", **depth), qk_norm=qk_norm))


@pytest.mark.parametrize("attention", ["reuse", "project"])
@pytest.mark.parametrize("name", READS)
def test_slot_policies(name: str, attention: str) -> None:
    check(config_of(n_layers=5, depth=dict(mechanism="moda", attention=attention, read=READS[name][0])))


def test_slots_in_fp8_are_rounded_if_asked_for() -> None:
    fp8 = config_of(depth=dict(mechanism="moda", slot_dtype="fp8"))
    native, rounding = pair(fp8, round_slots=True)
    with torch.no_grad():
        truth, plain = native(IDS), pair(fp8)[1](IDS).logits
        assert (truth - rounding(IDS).logits).abs().max() < TOLERANCE < 1e-5 < (truth - plain).abs().max()
        assert torch.equal(plain, pair(config_of(), round_slots=True)[1](IDS).logits)


def fits(depth: str | None, placement: str) -> bool:
    """Whether a mechanism works with a norm placement: some keep no single stream that post-norm could normalise."""
    return placement != "post" or depth not in ("attention_residuals", "delta_residuals")


@pytest.mark.parametrize(
    "depth, placement",
    [(d, p) for d in (None, *DepthMechanism.known) for p in NormPlacement.known if fits(d, p)],
)
def test_norm_placements(depth: Any, placement: str) -> None:
    check(config_of(norm_placement=placement, depth=None if depth is None else dict(mechanism=depth)))


@pytest.mark.parametrize(
    "changes",
    [
        dict(bias=True),
        dict(tie_embeddings=False),
        dict(n_kv_heads=4),
        dict(pad_vocab_to=1),
        dict(qk_norm="none", depth=dict(mechanism="moda", key_norm="none")),
        dict(n_layers=1),
    ],
    ids=str,
)
def test_other_settings(changes: dict[str, Any]) -> None:
    check(config_of(**changes))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp("export")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(list(pydoc_data.topics.topics.values())[:5], trainer)
    tok.save(str(folder / "tokenizer.json"))
    save_checkpoint(folder / "step10", run_config(folder / "tokenizer.json", sequence_length=64), seed=2)
    write_export(open_checkpoint(folder / "step10"), folder / "hf")
    return folder / "step10", folder / "hf"


# Runs where this project cannot be imported, as on a stranger's machine.
STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("moda", "moda_kernels", "olmo_core"):  # transformers itself looks for a package called kernels
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
texts = ["The quick brown fox", "import os, sys, and much more than that"]
batch = tokenizer(texts[1], return_tensors="pt")
with torch.no_grad():
    logits = model(**batch).logits
    ids, steps = batch["input_ids"], []
    for _ in range(12):  # greedy without a cache
        following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    greedy = model.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    tokenizer.padding_side = "left"
    padded = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**padded, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    loss = model(**batch, labels=batch["input_ids"]).loss
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
torch.save(dict(ids=batch["input_ids"], logits=logits, plain=ids, greedy=greedy, together=together, loss=loss), out + "/o.pt")
"""


def test_remote_code_where_the_project_is_absent(exported: tuple, tmp_path: Path) -> None:
    checkpoint, folder = exported
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    line = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path)]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "o.pt")
    native = load_model(open_checkpoint(checkpoint))
    with torch.no_grad():
        truth = native(found["ids"])
    assert (found["logits"] - truth).abs().max() < 1e-4
    # min_new_tokens forbids the end token; the plain loop has to agree as far as it does not choose it.
    assert torch.equal(found["greedy"], found["plain"]) or 0 in found["plain"][0, found["ids"].shape[1] :]
    n = found["ids"].shape[1]
    assert torch.equal(found["together"][1, -12 - n :], found["greedy"][0])  # a row of a left-padded batch
    expected = torch.nn.functional.cross_entropy(truth[0, :-1], found["ids"][0, 1:])
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_code_of_an_export_is_self_contained(exported: tuple) -> None:
    files = sorted(p.name for p in exported[1].glob("*.py"))
    assert files == sorted(bundle()) and {"modeling_moda.py", "mechanism.py", "moda.py", "placements.py"} <= set(files)
    for name in files:
        for node in ast.walk(ast.parse((exported[1] / name).read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= {"torch", *sys.stdlib_module_names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and f"{node.module}.py" in files


@pytest.mark.parametrize(
    "line",
    ["import moda.errors", "from moda.depth import mechanism", "from . import mechanism", "import moda.errors as e"],
)
def test_imports_that_an_export_cannot_have_are_refused(line: str) -> None:
    with pytest.raises(
        UserError, match=r"from MODULE import NAME .*\(line 2, in moda.depth\), got the whole module moda"
    ):
        list(_imports(ast.parse(f"import math\n{line}"), "moda.depth"))


def test_an_export_of_an_older_version_is_one_error(exported: tuple, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "moda", "d_model": 32}))
    for read in (open_model, lambda path: load_decoder(Path(path), torch.device("cpu"))):
        with pytest.raises(UserError, match="model section.*export the checkpoint again"):
            read(str(tmp_path))


def test_the_model_section_is_exported_as_it_is(exported: tuple) -> None:
    settings = json.loads((exported[0] / "config.json").read_text())["model"]
    config = json.loads((exported[1] / "config.json").read_text())
    assert config["model"] == {**settings, "vocab_size": 300}
    assert not {"hidden_size", "num_hidden_layers", "norm_placement"} & set(config)


def test_import_back(exported: tuple, tmp_path: Path) -> None:
    checkpoint, folder = exported
    write_checkpoint(folder, tmp_path / "step0")
    before, after = read_weights(checkpoint), read_weights(tmp_path / "step0")
    assert before.keys() == after.keys()
    for name, w in before.items():
        real = 300 if name == "embeddings.weight" else len(w)
        assert torch.equal(w[:real], after[name][:real])
    (folder / "moda_run.json").rename(tmp_path / "moda_run.json")  # as if it came from elsewhere
    try:
        write_checkpoint(folder, tmp_path / "step1")
    finally:
        (tmp_path / "moda_run.json").rename(folder / "moda_run.json")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        models = [load_model(open_checkpoint(p)) for p in (checkpoint, tmp_path / "step1")]
        assert torch.allclose(models[0](ids), models[1](ids), atol=1e-6)


def test_evaluation_of_an_export_agrees(exported: tuple) -> None:
    from moda_evals.downstream import evaluate_task
    from moda_evals.model import load
    from moda_evals.tasks import TASKS

    native, theirs = (load(str(p), context_length=512) for p in exported)
    assert theirs.kind == "huggingface"
    a, b = (evaluate_task(m, TASKS["copa"], limit=20, per_example=True) for m in (native, theirs))
    assert a["correct"] == b["correct"]
    for x, y in zip(a["examples"], b["examples"]):
        assert x["log_likelihoods"] == pytest.approx(y["log_likelihoods"], abs=1e-3)


def test_another_model_of_transformers(exported: tuple, tmp_path: Path) -> None:
    """Any causal language model in safetensors; pickled weights are refused."""
    import transformers

    from moda_evals.downstream import evaluate_task
    from moda_evals.model import load
    from moda_evals.tasks import TASKS

    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llama" / name).write_bytes((exported[1] / name).read_bytes())
    model = load(str(tmp_path / "llama"))
    assert evaluate_task(model, TASKS["copa"], limit=10)["n"] == 10
    file = tmp_path / "llama" / "model.safetensors"
    file.rename(tmp_path / "llama" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(str(tmp_path / "llama"))


def test_bad_exports(exported: tuple, tmp_path: Path) -> None:
    checkpoint, folder = exported
    with pytest.raises(UserError, match="new or empty folder"):
        write_export(open_checkpoint(checkpoint), folder)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="an export of this project"):
        write_checkpoint(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("depth", DepthMechanism.known)
def test_device_maps_and_offloading_do_not_change_the_model(depth: str, tmp_path: Path) -> None:
    """Hooks that rebuild the arguments of each block: one layer's weights on disk, the others' in place."""
    from accelerate import dispatch_model

    options: dict[str, Any] = {"mechanism": depth}
    if depth == "moda":
        options.update(attention="project", key_norm="reader")
    _, exported = pair(config_of(depth=options, tie_embeddings=False, norm_placement="pre"))
    exported = exported.float()
    with torch.no_grad():
        truth = exported(IDS).logits
        greedy = exported.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.depth": "cpu", "lm_head": "cpu"}
        parts |= {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(4)}
        moved = dispatch_model(exported, parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        assert next(moved.model.layers[2].parameters()).is_meta
        torch.testing.assert_close(moved(IDS).logits, truth)
        again = moved.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(again, greedy)


def test_a_static_cache_and_hidden_states() -> None:
    _, exported = pair(config_of())
    options: dict[str, Any] = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        static = exported.generate(IDS, cache_implementation="static", **options)
        assert torch.equal(static, exported.generate(IDS, **options))
        out = exported(IDS, output_hidden_states=True)
        assert len(out.hidden_states) == 5
        torch.testing.assert_close(out.hidden_states[0], exported.model.embed_tokens(IDS))
        torch.testing.assert_close(exported.lm_head(out.hidden_states[-1]), out.logits)


SLOTS = [
    dict(mechanism="moda", ffn=False),
    dict(mechanism="depth_only", ffn=False),
    dict(mechanism="depth_attention", stride=1),
]


@pytest.mark.parametrize("depth", SLOTS, ids=lambda d: d["mechanism"])
def test_attention_weights_of_the_sequence_and_of_the_depth_slots(depth: dict[str, Any]) -> None:
    """They give the attention's output: of layer l, over its own values and those of the same token in layers 0 to l - 1.

    In Depth-Attention the latter, already mixed themselves, are mixed with the layer's own first, and the sequence sees the mix.
    """
    _, exported = pair(config_of(depth=depth))
    values: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for layer in exported.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out.unflatten(-1, (2, 8))))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a: outputs.append(a[0].unflatten(-1, (4, 8))))
    with torch.no_grad():
        attentions = exported(IDS, output_attentions=True).attentions
        again = exported(IDS[:, :1], output_attentions=True, output_hidden_states=True)
    assert [tuple(w.shape) for w in attentions] == [(2, 4, 9, 9 + layer) for layer in range(4)]
    assert len(again.attentions) == 4 and len(again.hidden_states) == 5
    for layer, weights in enumerate(attentions):
        wide = [v.repeat_interleave(2, dim=2) for v in values[: layer + 1]]
        if depth["mechanism"] == "depth_attention":
            among = [weights[..., 9 + s].transpose(1, 2)[..., None] for s in range(layer)]
            own = 1 - sum(among)
            mixed = own * wide[layer] + sum(w * v for w, v in zip(among, wide))  # type: ignore[misc]
            values[layer] = mixed[:, :, ::2]
            wide, weights = [*wide[:layer], mixed], weights[..., :9]
        found = torch.einsum("bhts,bshd->bthd", weights[..., :9], wide[layer])
        for s in range(weights.shape[-1] - 9):
            found = found + weights[..., 9 + s].transpose(1, 2)[..., None] * wide[s]
        torch.testing.assert_close(found, outputs[layer], rtol=0, atol=TOLERANCE)


def test_the_loss_counts_the_labels_of_all_accumulation_steps() -> None:
    """As transformers' Trainer calls it: parts of a batch with unequal labels add up to the whole batch's mean loss."""
    _, exported = pair(config_of())
    labels = IDS.clone()
    labels[0, :6] = -100
    whole = exported(IDS, labels=labels).loss
    items = int((labels[:, 1:] != -100).sum())
    parts = [exported(i[None], labels=t[None], num_items_in_batch=items).loss for i, t in zip(IDS, labels)]
    torch.testing.assert_close(sum(parts), whole)


def test_weights_that_are_not_the_models_or_not_finite_are_refused(tmp_path: Path) -> None:
    for name, spoil in (("nan", lambda w: w.fill_(float("nan"))), ("shape", lambda w: w.resize_(3))):
        folder = tmp_path / name
        config = run_config(make_tokenizer(tmp_path / "tokenizer.json"), sequence_length=64)
        save_checkpoint(folder, config, spoil=spoil)
        with pytest.raises(
            UserError, match="finite weights" if name == "nan" else r"blocks.1.attention_norm.weight \(16,\)"
        ):
            write_export(open_checkpoint(folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()
