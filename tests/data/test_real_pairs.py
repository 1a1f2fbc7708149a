"""What the token budget does to real pairs of HH-RLHF: the figures of the documentation, and the time it takes."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import inspect_data
import pytest
from running import ROOT


def read_lines(shared: Path) -> list[bytes]:
    files = (shared / "hh-rlhf" / f"{split}.jsonl.gz" for split in ("train", "test"))
    return [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines(keepends=True)]


def test_figures_of_the_documentation(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The 1,800 real pairs as one train split, beside a small test split."""
    data, lines = tmp_path / "hh-rlhf", read_lines(shared)
    data.mkdir()
    (data / "train.jsonl").write_bytes(b"".join(lines))
    (data / "test.jsonl").write_bytes(b"".join(lines[:20]))
    out, tokenizer = tmp_path / "figures.json", shared / "gpt2-tokenizer"
    inspect_data.main(["--model_name_or_path", str(tokenizer), "--dataset_name", str(data), "--json", str(out)])
    figures: dict[str, Any] = json.loads(out.read_text())["train"]
    assert (figures["pairs_in"], figures["pairs_kept"], figures["dropped"]) == (1800, 1800, {})
    assert round(figures["completion_tokens_kept"], 3) == 0.887
    assert round(figures["questions_whole"], 3) == 0.995
    assert round(figures["tokens_per_pair"]["shared_prefix"], 1) == 135.7
    assert figures["stock"]["pairs_kept"] == 1130, "the stock rule is said to keep another number of pairs"
    assert figures["stock"]["completion_tokens_kept"] < 0.45 and figures["stock"]["questions_whole"] < 0.65
    assert "offensive" in capsys.readouterr().out, "HH's text is shown without its authors' notice"


def test_fitted_tokens_stay_the_same(gpt2_tokenizer: Any, shared: Path):
    """Other tokens under a later version: raise CACHE_VERSION, and say in the log that figures changed."""
    from tinydpo.config.arguments import DataArguments
    from tinydpo.data.pairs import load_split

    summary = load_split(DataArguments(dataset_name=str(shared / "hh-rlhf")), gpt2_tokenizer, 128, "test").summary
    assert summary["sha256"] == "8120162eaace6503f8ee2e2c78d99570d0b2b562aad663c81c64f7f18eed249b"


MEASURE = """
import json, resource, sys
from tinydpo.config.arguments import DataArguments
from tinydpo.models.loading import load_tokenizer
from tinydpo.data.pairs import load_pairs

def peak():  # MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def cpu():  # seconds, which other work on the machine does not change
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

tokenizer = load_tokenizer(sys.argv[1])
before, start = peak(), cpu()
splits = load_pairs(DataArguments(dataset_name=sys.argv[2]), tokenizer, 128)
pairs = sum(len(split.pairs) for split in splits.values())
print(json.dumps({"pairs": pairs, "cpu_seconds": cpu() - start, "grown": peak() - before}))
"""


@pytest.mark.slow
def test_full_data_set_takes_minutes_and_little_memory(shared: Path, tmp_path: Path):
    lines, file = read_lines(shared), tmp_path / "many.jsonl"
    with open(file, "wb") as stream:
        for i in range(160_800):
            stream.write(lines[i % len(lines)])
    command = [sys.executable, "-c", MEASURE, str(shared / "gpt2-tokenizer"), str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True, text=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(measured)
    assert measured["pairs"] == 160_800, "pairs are lost"
    assert measured["cpu_seconds"] < 0.75 * 2 * 180, f"too much work for two cores in 3 minutes: {measured}"
    assert measured["grown"] < 600, f"the pairs are held in memory: {measured}"
