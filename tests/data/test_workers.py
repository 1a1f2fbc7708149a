"""How many processes read data: as many as asked for, no more than a container allows; one that dies is a sentence."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from running import run

from tinydpo.config import launch as machine
from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError


@pytest.mark.parametrize("script", ["sft", "dpo"])
@pytest.mark.parametrize("workers", [1, 2])
def test_as_many_processes_as_asked_read(
    script: str, workers: int, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, map_rows = [], Dataset.map

    def counted(*args: Any, num_proc: int | None = None, desc: str | None = None, **kwargs: Any) -> Dataset:
        asked.append((desc, num_proc or 1))
        return map_rows(*args, num_proc=num_proc, desc=desc, **kwargs)

    monkeypatch.setattr(Dataset, "map", counted)
    monkeypatch.setattr("tinydpo.data.pairs.LARGE", 2)  # all cores, if nobody asks
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with pytest.raises(UserError, match="max_question_length"):  # before the model, at the first split's fitting
        run(script, "--model_name_or_path", task / "base", "--dataset_name", task / "data", "--dataset_num_proc",
            str(workers), "--max_question_length", "500", "--output_dir", tmp_path / "run")  # fmt: skip
    assert ("Reading pairs", workers) in asked, f"--dataset_num_proc {workers} has no effect: {asked}"


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9000000 100000", 8), ("", 8), (None, 8)],
)
def test_a_containers_quota_counts(quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.count_cores() == expected, (
        "large data would be read by more processes than the container runs at once"
    )


@pytest.mark.parametrize("place", ["text.render_row", "fitting.fit_pair"])
def test_a_worker_that_is_killed_is_one_sentence(
    place: str, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parent = os.getpid()

    def die(*args: Any, **kwargs: Any) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nothing was read by another process")

    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a run before left its handler, and workers do not end"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(f"tinydpo.data.{place}", die)
    rows = [{"prompt": "Which?", "chosen": f"yes {i} {place}", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"one of the 2 processes that read it was killed.*--dataset_num_proc 1"):
        load_pairs(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")), tiny_tokenizer, 128, workers=2)
