"""The benchmarks run offline with one command, and what they measure holds even at toy size."""

import json
import sys
from pathlib import Path

import pytest
import throughput
from running import call

from tinydpo.errors import UserError
from tinydpo.toy_task import write_task


@pytest.mark.slow
def test_throughput_compares_tinydpo_with_trl(tmp_path: Path):
    """One step of a toy model: far from the documented ratios, but never slower or larger than stock TRL."""
    done = call(sys.executable, "benchmarks/throughput.py", "--model", "gpt2-tiny", "--steps", "1", "--threads", "1",
                "--contenders", "bcd", "--output", tmp_path / "bench.json", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, f"make bench fails:\n{done.stdout}{done.stderr}"
    rows = json.loads((tmp_path / "bench.json").read_text())["contenders"]
    for name in ("trl", "trl-tuned"):
        assert rows[name]["tinydpo_is_faster_by"] > 1, f"{name} is faster than tinydpo: {rows[name]}"
    assert rows["tinydpo"]["peak_memory_gib"] <= rows["trl"]["peak_memory_gib"], "tinydpo needs more memory than TRL"
    assert all("reference" in rows[name]["phases"] for name in ("trl-tuned", "tinydpo")), "no reference pass counted"
    assert done.stdout.count("| tinydpo |") == 1, f"the Markdown table lacks tinydpo's row:\n{done.stdout}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--contenders", "tinyppo"], "tinyppo"), (["--dataset_name", "x.jsonl"], "--tokenizer_name is missing")],
)
def test_impossible_bench_is_one_sentence(flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        throughput.main(flags)


@pytest.mark.slow
def test_speedrun_ends_in_a_table(tmp_path: Path):
    for seed, name in enumerate(("helpful", "harmless")):
        write_task(tmp_path / name, tmp_path / "base", seed=seed)
    done = call(sys.executable, "benchmarks/speedrun.py", "--train_pairs", "64", "--test_pairs", "16", "--num_prompts",
                "4", "--dataset_name", tmp_path / "helpful", tmp_path / "harmless", "--tokenizer_name",
                tmp_path / "base", "--output_dir", tmp_path / "run", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, f"make speedrun fails:\n{done.stdout}{done.stderr}"
    assert "not HH's full size" in done.stdout, "a small run passes for the full one"
    assert "from helpful + harmless pairs" in done.stdout, "the table does not name the data"
    results = json.loads((tmp_path / "run/speedrun.json").read_text())
    assert results["total_seconds"] > 0 and set(results["seconds"]) >= {"SFT", "evaluation"}
