"""The cache of records, texts and tokens: shared by processes that start at once, killed while it is written, cut."""

import importlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_bad_datasets import pair, row
from transformers import AutoTokenizer

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs

# A server that has imported everything once, and no threads: processes are forked from it, not from this one.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tinydpo.data.pairs", "transformers"])
BEFORE_KILL = 2_200  # rows of 2,500: two batches of them are on disk


def load(file: Path, model: Path) -> tuple[list, dict]:
    """All that a run takes from the data, out of the cache's files."""
    splits = load_pairs(DataArguments(dataset_name=str(file)), AutoTokenizer.from_pretrained(model), 128)
    return [split.pairs.to_list() + split.texts.to_list() for split in splits.values()], splits["train"].summary


def data(folder: Path, rows: int = 2_500) -> tuple[Path, Path]:
    """A file, and one of another name, so of another cache, with the same rows; three batches of them are written."""
    for name in ("a.json", "same.json"):
        (folder / name).write_text(json.dumps([row(pair(i)) for i in range(rows)]))
    return folder / "a.json", folder / "same.json"


def load_at_once(ready: Any, results: Any, file: Path, model: Path) -> None:
    ready.wait(100)
    results.put(load(file, model))


def load_and_die(place: str, file: Path, model: Path) -> None:
    """Load, and be killed in the call of `place` after so many calls."""
    *path, name = place.split(".")
    module, left = importlib.import_module(".".join(path)), BEFORE_KILL
    work = getattr(module, name)

    def work_or_die(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **kwargs)

    setattr(module, name, work_or_die)
    load(file, model)


def test_processes_that_start_at_once(tmp_path: Path, tiny_model: Path):
    file, same = data(tmp_path, 400)
    ready, results = PROCESSES.Barrier(3), PROCESSES.Queue()
    processes = [PROCESSES.Process(target=load_at_once, args=(ready, results, file, tiny_model)) for _ in range(3)]
    for process in processes:
        process.start()
    loaded = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(100)
    expected = load(same, tiny_model)
    assert all(one == expected for one in loaded), "processes that share a cache train on different pairs"
    assert load(file, tiny_model) == expected, "processes that share a cache leave a wrong one behind"


@pytest.mark.parametrize("place", ["json.dumps", "tinydpo.data.text.render_row", "tinydpo.data.fitting.fit_pair"])
def test_killed_while_the_cache_is_made(place: str, tmp_path: Path, tiny_model: Path):
    file, same = data(tmp_path)
    process = PROCESSES.Process(target=load_and_die, args=(place, file, tiny_model))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL, "the process was not killed at its work"
    assert load(file, tiny_model) == load(same, tiny_model), "half of a killed process's work is taken for whole"


def test_cut_files_are_made_again(tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture):
    file, _ = data(tmp_path)
    expected = load(file, tiny_model)
    splits = load_pairs(DataArguments(dataset_name=str(file)), AutoTokenizer.from_pretrained(tiny_model), 128)
    # Records, the choices of held-out rows, texts and tokens.
    files = sorted(Path(splits["train"].pairs.cache_files[0]["filename"]).parent.glob("*.arrow"))
    assert len(files) >= 7, "they lie elsewhere: nothing is tried here"
    for path in files:
        # In half, and to where Arrow would read a whole file of fewer rows.
        for keep in (lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-8]):
            half = path.with_name("half")  # in a file of its own: the old one may still be open here
            half.write_bytes(keep(path.read_bytes()))
            os.replace(half, path)
            capfd.readouterr()
            assert load(file, tiny_model) == expected, f"{path.name}: cut, and other pairs are trained on"
            told = capfd.readouterr().err
            assert str(path) in told and told.count("\n") == 1, f"{path.name} is cut, and not in one line: {told}"
    assert load(file, tiny_model) == expected and not capfd.readouterr().err, "they are not made whole again"
