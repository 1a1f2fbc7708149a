"""The benchmarks run offline with one command, and what they measure holds even at toy size."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import BIN, ROOT, call

from tinydpo.models.precision import has_fast_bf16

FAST = has_fast_bf16("cpu")  # asked before `float32_by_default` has this CPU deny it


@pytest.mark.slow
def test_throughput_holds_tinydpo_against_its_peers(tmp_path: Path):
    """One step of a toy model: far from the documented ratios, but never slower or larger than stock TRL."""
    done = call(sys.executable, "benchmarks/throughput.py", "--model", "gpt2-tiny", "--steps", "1", "--threads", "1",
                "--output", tmp_path / "bench.json", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, f"make bench fails:\n{done.stdout}{done.stderr}"
    rows = json.loads((tmp_path / "bench.json").read_text())["contenders"]
    for name in "abc":
        assert rows[name]["tinydpo_is_faster_by"] > 1, f"contender ({name}) is faster than tinydpo: {rows[name]}"
    assert rows["d"]["peak_memory_gib"] <= rows["b"]["peak_memory_gib"], "tinydpo needs more memory than stock TRL"
    assert all("reference" in rows[name]["phases"] for name in "cd"), "the reference pass is not counted"
    assert all(0 < row["share_of_matmul_rate"] < 2 for row in rows.values()), "no share of the machine's rate"
    table = [line for line in done.stdout.splitlines() if line.startswith("| d ")]
    assert len(table) == 1, f"the Markdown table lacks tinydpo's row:\n{done.stdout}"


@pytest.mark.slow
def test_throughput_in_bf16(tmp_path: Path):
    """On a machine without it too, where it only says that it is slow."""
    done = call(sys.executable, "benchmarks/throughput.py", "--model", "gpt2-tiny", "--steps", "1", "--threads", "1",
                "--contenders", "d", "--dtype", "bfloat16", "--pairs_per_step", "2",
                "--output", tmp_path / "bench.json", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, f"make bench fails in bf16:\n{done.stdout}{done.stderr}"
    assert json.loads((tmp_path / "bench.json").read_text())["dtype"] == "bfloat16"
    slow = "This device has no fast bf16" in done.stdout
    assert slow is not FAST, "a machine without fast bf16 is not told apart from one with it"


@pytest.mark.parametrize(
    ("flags", "told"),
    [(["--pairs_per_step", "6"], "4 pairs at a time"), (["--dataset_name", "x.jsonl"], "tokenizer_name")],
)
def test_a_bench_that_cannot_be_is_one_sentence(flags: list[str], told: str):
    done = call(sys.executable, "benchmarks/throughput.py", *flags)
    assert done.returncode and told in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_speedrun_ends_in_a_table(tmp_path: Path):
    done = call(sys.executable, "benchmarks/speedrun.py", "--train_pairs", "64", "--test_pairs", "16", "--num_prompts",
                "4", "--output_dir", tmp_path / "run", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, f"make speedrun fails:\n{done.stdout}{done.stderr}"
    assert "not HH's full size" in done.stdout, "a small run passes for the full one"
    assert "earlier script took" not in done.stdout, "a small run on a CPU is held against the full one"
    results = json.loads((tmp_path / "run/speedrun.json").read_text())
    assert results["total_seconds"] >= sum(results["seconds"].values()) > 0


@pytest.mark.slow
def test_help_is_no_slower_than_that_of_trl():
    commands = {"ours": [sys.executable, "scripts/dpo.py", "--help"], "trl": [BIN / "trl", "dpo", "--help"]}
    seconds = {name: [] for name in commands}
    for _ in range(5):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "trl"))
    assert ours <= 1.1 * theirs, f"--help takes {ours:.1f} s, trl dpo --help {theirs:.1f} s"  # a tenth for noise
