"""The benchmark's registry, floors and plots; its times need a GPU."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moda_kernels.benchmarks.cases import TABLES
from moda_kernels.benchmarks.floors import Ceilings, floor_ms, pairs
from moda_kernels.benchmarks.plots import draw_sweeps
from moda_kernels.benchmarks.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
H200 = Ceilings(bandwidth=4.24e12, matrix_rate=750e12)


def case(table: str, **fields: object):
    return next(c for c in TABLES[table] if all(getattr(c, n) == v for n, v in fields.items()))


def test_tables_hold_the_papers_rows() -> None:
    assert [c.T for c in TABLES["2"] if c.sweep == "T"] == [4096, 8192, 16384, 32768, 65536]
    assert [c.G for c in TABLES["2"] if c.sweep == "G"] == [2, 4, 16, 32]
    assert all(c.paper_ms is not None and c.D == 64 and c.Hk == 8 for c in TABLES["2"])
    assert TABLES["7"][0].T == 1024
    assert set(VARIANTS) == {"cudnn", "flash_attn_4", "flash", "triton", "reference", "fused", "split"}


def test_floors_of_the_papers_shape() -> None:
    """Depth attention alone at T = 16384, G = 8, 64 slots, 4.24 TB/s: about 0.60 ms forward, 1.17 storing, 1.68 adding."""
    depth = case("siblings", T=16384, sequence=False, fp8=False)
    assert floor_ms(depth, "forward", H200) == pytest.approx(0.571, abs=0.01)
    assert floor_ms(depth, "backward", H200) == pytest.approx(1.14, abs=0.03)
    assert floor_ms(depth, "backward-add", H200) == pytest.approx(1.65, abs=0.03)
    fp8 = case("siblings", T=16384, sequence=False, fp8=True)
    queries = 16384 * 64 * (2 * 64 * 2 + 4)  # q and out or four of them, and the LSE
    moved = 2 * 64 * 16384 * 8 * (64 + 4) + queries
    assert floor_ms(fp8, "forward", H200) == pytest.approx(moved / H200.bandwidth * 1e3)
    moved += 2 * 16384 * 64 * 64 * 2 + 2 * (2 * 64 * 16384 * 8 * 64 * 2)
    assert floor_ms(fp8, "backward-add", H200) == pytest.approx(moved / H200.bandwidth * 1e3)
    row = case("2", T=16384, G=8, S=64)
    assert pairs(row) == 16384**2 / 2 + 16384 * 64
    assert floor_ms(row, "both", H200) == pytest.approx(3.5 * 4 * pairs(row) * 64 * 64 / 750e12 * 1e3)


def test_plots_come_from_the_csv_alone(tmp_path: Path) -> None:
    path = tmp_path / "table_2.csv"
    names = [
        "sweep",
        "T",
        "G",
        "S",
        "D",
        "Hk",
        "variant",
        "pass",
        "status",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "over_cudnn",
    ]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [*names, "floor_ms", "gpu", "commit"])
        writer.writeheader()
        for T in (8192, 16384):
            for variant in ("cudnn", "fused"):
                writer.writerow(
                    dict(
                        sweep="T", T=T, G=8, S=64, D=64, Hk=8, variant=variant, status="ok", median_ms=T / 1000,
                        p20_ms=T / 1001, p80_ms=T / 999, over_cudnn=1.1, floor_ms=1.0, gpu="none", commit="0",
                    ) | {"pass": "both"}
                )  # fmt: skip
    assert [p.name for p in draw_sweeps(path)] == ["table_2_T.png"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_the_script_says_so() -> None:
    found = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), "kernels", "--table", "2"], capture_output=True, text=True
    )
    assert found.returncode == 2 and "CUDA device is needed" in found.stdout


@pytest.mark.gpu
def test_a_variant_that_misses_parity_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moda_kernels.benchmarks.kernels import run_table
    from moda_kernels.moda_attention import fused
    from moda_kernels.moda_attention.tensors import Result

    right = fused.backend.forward

    def wrong(*arguments):
        out, lse = right(*arguments)
        return Result(out * 1.05, lse)

    monkeypatch.setattr(fused.backend, "forward", wrong)
    path = run_table("7", tmp_path, ("cudnn", "fused"), only="T1024")
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["status"] for r in rows if r["variant"] == "fused"} == {"parity failed"}
    assert {r["status"] for r in rows if r["variant"] == "cudnn"} == {"ok"}
    assert all(r["median_ms"] == "" for r in rows if r["variant"] == "fused")


def test_rows_say_where_they_are_from(tmp_path: Path) -> None:
    from moda_kernels.benchmarks.results import provenance, write

    path = write(tmp_path / "new" / "t.csv", [{"a": 1, "b": None}, {"a": 2, "b": "x, y"}])
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    where = provenance()
    assert {"gpu", "cpu", "python", "torch", "triton", "commit", "date"} <= where.keys() and where["cpu"]
    assert [{k: r[k] for k in ("a", "b")} for r in rows] == [{"a": "1", "b": ""}, {"a": "2", "b": "x, y"}]
    assert all(r[name] == value for r in rows for name, value in where.items())
    assert list(rows[0]) == ["a", "b", *where] and [p.name for p in path.parent.iterdir()] == ["t.csv"]


def test_committed_results_are_readable_and_of_the_current_columns() -> None:
    from moda_kernels.benchmarks.kernels import COLUMNS
    from moda_kernels.benchmarks.results import provenance

    folder = ROOT / "docs" / "benchmarks"
    for path in folder.glob("*.csv"):
        with path.open(newline="") as f:
            rows = list(csv.DictReader(f))
        assert rows and all(r["commit"] for r in rows), path.name
        if path.stem in ("table_2", "table_7", "table_siblings"):
            own = [name for name in rows[0] if name not in provenance()]
            assert own == [name for name in COLUMNS if name in own], path.name  # columns may be added, none renamed
            assert {"case", "variant", "pass", "status", "median_ms", "floor_ms", "cudnn_ms"} <= set(own)


def test_quantiles_and_seconds() -> None:
    from moda_kernels.benchmarks.timing import quantiles, seconds

    q = quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (q.median, q.p20, q.p80, q.repeats) == (3.5, 2.0, 5.0, 6)
    assert 0.01 < seconds(lambda: time.sleep(0.01)) < 5


def test_the_operator_alone_has_the_command_line_too() -> None:
    code = """
import runpy, sys
sys.argv = ["bench", "kernels", "--help"]
try:
    runpy.run_module("moda_kernels.benchmarks", run_name="__main__")
except SystemExit as e:
    assert e.code == 0
assert not {"moda", "rich", "olmo_core", "triton"} & set(sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "kernels")
    assert shown.returncode == 0 and "--table" in shown.stdout, shown.stderr


@pytest.mark.parametrize(
    "line, message",
    [
        (["kernels", "--table", "2", "--variants", "flsh"], "invalid choice: 'flsh'"),
        (["kernels", "--table", "2", "--budget-ms", "0"], "expected a number > 0, got 0"),
        (["kernels", "--table", "2", "--budget-ms", "nan"], "expected a number > 0, got nan"),
        (["parity", "--seeds", "0"], "expected an integer >= 1, got 0"),
        (["data", "--out", "t.csv", "--repeats", "x"], "expected an integer >= 1, got x"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_options_are_refused(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from moda_kernels.benchmarks.registry import build_parser

    parser = build_parser(["moda_kernels.benchmarks.kernels", "moda.bench.parity", "moda.bench.data"], ROOT)
    with pytest.raises(SystemExit) as refused:
        parser.parse_args(line)
    assert refused.value.code == 2 and message in capsys.readouterr().err
