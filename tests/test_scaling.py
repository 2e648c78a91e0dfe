"""docs/scaling.md: its computed table, the formula behind it, the Slurm script and the Dockerfile."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from moda.bench import projection
from moda.bench.projection import Links, project, update
from moda.config import load_config
from moda.train.memory import a_gpu
from moda.train.plan import make_plan
from moda_cli._main import arguments
from tests.tiny import ROOT

SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"


def test_the_table_is_what_is_computed() -> None:
    page = ROOT / "docs" / "scaling.md"
    text = update(page)
    assert text == page.read_text(encoding="utf-8"), "make docs"
    assert text.count("| moda_700m | ") == text.count("| moda_1.5b | ") == len(projection.GPUS)


def test_communication_by_hand() -> None:
    """16 GPUs, two copies, one microbatch each, links so slow that nothing is hidden, and links that cost nothing."""
    overrides = ["train.microbatch_size=64", "parallel.data=hsdp", "parallel.shard_degree=8"]
    plan = make_plan(load_config(ROOT / "configs" / "moda_700m.yaml", overrides), 16, a_gpu(80))
    params, outside = plan.transformer.num_params, 1024 * plan.transformer.vocab_size
    compute = 64 * 4096 / 75_000
    slow = project(plan, 75_000, Links(in_host=1e6, between=1e6, reached=0.5))
    assert slow.compute == pytest.approx(compute)
    assert slow.in_host == pytest.approx((2 + 2 + 4) * params * 7 / 8)
    assert slow.between == pytest.approx(2 * 1 / 2 * 4 * params / 8)
    seconds = (slow.in_host + 6 * outside * 7 / 8 + 4 * outside / 8) / 0.5e6
    # The sum over copies runs beside what is gathered and reduced within the host, and is shorter.
    assert slow.exposed == pytest.approx(seconds - compute)
    free = project(plan, 75_000, Links(in_host=1e18, between=1e18))
    assert free.exposed < 1e-6 and free.days == pytest.approx(400e9 / 16 / 75_000 / 86400, rel=1e-4)
    assert free.mfu == pytest.approx(75_000 * plan.flops_per_token / 989e12, rel=1e-4)


def test_the_slurm_script() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, flags=re.M))
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("TERM@")
    usage = next(line for line in text.splitlines() if line.startswith("#   sbatch"))
    words = shlex.split(usage.lstrip("# "))
    assert ROOT / words[2] == SBATCH
    args = arguments("train", words[3:])
    make_plan(load_config(ROOT / args.config, args.overrides), 64, a_gpu(80))
    launched = shlex.split(text[text.index("srun") :].replace("\\\n", " "))
    assert launched[-2:] == ["scripts/train.py", "$@"] and "torchrun" in launched
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text


def test_the_dockerfile() -> None:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line]
    assert instructions[0][0] == "FROM" and {i for i, _ in instructions} <= {
        "FROM",
        "RUN",
        "WORKDIR",
        "ARG",
        "COPY",
        "CMD",
    }
    copied = [source for i, rest in instructions if i == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    kept = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), flags=re.M))
    assert kept == set(copied) and {"pyproject.toml", "README.md", "LICENSE"} <= kept
    asked = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\.\[([\w,-]+)\]", text)
    assert extras is not None and all(f"\n{extra} = [" in asked for extra in extras[1].split(","))
    torch = re.search(r'ARG TORCH=("[^"]+")', text)
    assert torch is not None and torch[1] in asked


def test_what_crosses_the_cuts_of_a_pipeline() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for read, config in (
        ("`all`", []),
        ("`{recent: 6}`", ["model.depth.read={recent: 6}"]),
        ("no", ["model.depth=null"]),
    ):
        plan = make_plan(
            load_config(ROOT / "configs" / "moda_700m.yaml", [*config, "parallel.pipeline=4"]), 8, a_gpu(80)
        )
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {read}") and line.count("|") == 4)
        told = dict(plan.rows())["bytes per token across each cut, each way (bf16)"]
        slots, sent = (re.findall(pattern, told) for pattern in (r"\((\d+) slots\)", r"([\d,]+) \("))
        assert row.endswith(f" | {', '.join(slots)} | {', '.join(sent)} |"), told
        assert dict(plan.rows())["layers of each stage"] == "0-9, 10-20, 21-31, 32-35"
