"""An evaluation on rows that its policy was trained on says so, whatever file or split they come from."""

import importlib
import json
from pathlib import Path

import pytest
from running import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft` on the task's first 48 rows, `dpo` from it on the others."""
    folder = tmp_path_factory.mktemp("trained")
    lines = (task / "data/train.jsonl").read_text().splitlines(keepends=True)
    for stage, rows, start in (("sft", lines[:48], tiny_model), ("dpo", lines[48:], folder / "sft")):
        (folder / f"{stage}-data").mkdir()
        (folder / f"{stage}-data/train.jsonl").write_text("".join(rows))
        (folder / f"{stage}-data/test.jsonl").write_bytes((task / "data/test.jsonl").read_bytes())
        run(stage, "--model_name_or_path", start, "--dataset_name", folder / f"{stage}-data", "--output_dir",
            folder / stage, "--max_steps", "1", "--eval_strategy", "no")  # fmt: skip
    return folder


def prompt(line: str) -> str:
    return json.loads(line)["chosen"].rpartition("\n\nAssistant:")[0]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_rows_of_the_run_and_of_the_one_it_began_from_are_told(
    stage: str, runs: Path, tiny_model: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Half of these rows are held out; of the others the SFT run saw the first, under another file's name."""
    held_out = (task / "data/test.jsonl").read_text().splitlines(keepends=True)[:12]
    seen = (runs / "sft-data/train.jsonl").read_text().splitlines(keepends=True)[:12]
    (tmp_path / "rows").mkdir()
    for name, lines in (("train", held_out), ("test", held_out + seen)):
        (tmp_path / f"rows/{name}.jsonl").write_text("".join(lines))
    stages = ("sft", "dpo") if stage == "dpo" else ("sft",)
    files = [(runs / f"{name}-data/train.jsonl").read_text() for name in stages]
    trained = {prompt(line) for file in files for line in file.splitlines()}
    expected = sum(prompt(line) in trained for line in held_out + seen)
    assert 12 <= expected < 24, "the task's prompts are not as this test needs them"

    def evaluated(data: Path, folder: str) -> tuple[dict, str]:
        capsys.readouterr()
        flags = ["--model_name_or_path", runs / stage, "--ref_model_name_or_path", tiny_model, "--dataset_name", data,
                 "--output_dir", tmp_path / folder, "--max_length", "128", "--num_prompts", "2"]  # fmt: skip
        importlib.import_module("evaluate").main([*map(str, flags)])
        return json.loads((tmp_path / folder / "eval_results.json").read_text()), capsys.readouterr().out

    results, told = evaluated(tmp_path / "rows", "seen")
    assert results["trained_share"] == pytest.approx(expected / 24), "the record does not say what was trained on"
    sentence = f"trained on the prompts of {expected} of 24 pairs"
    assert told.count(sentence) == 1, f"a user takes trained rows for held-out ones:\n{told}"
    assert sentence in (runs / stage / "README.md").read_text(), "the card tells trained rows as held out"
