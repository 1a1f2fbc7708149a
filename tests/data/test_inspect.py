"""`make inspect`: figures of the token budget by hand on a few pairs, its page and its JSON, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import inspect_data
import pytest

from tinydpo.errors import UserError, report_errors

PROMPT = "\n\nHuman: Hi!\n\nAssistant:"
GOOD = {"prompt": PROMPT, "chosen": " Yes.", "rejected": " No."}


def inspect(task: Path, data: Path, out: Path, *flags: str) -> dict[str, Any]:
    model = str(task / "base")
    inspect_data.main(["--model_name_or_path", model, "--dataset_name", str(data), "--json", str(out), *flags])
    return json.loads(out.read_text())


def write(folder: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "train.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "test.jsonl").write_text(json.dumps(GOOD) + "\n")
    return folder


def test_page_and_figures(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figures = inspect(task, task / "data", tmp_path / "figures.json", "--examples", "2")
    assert set(figures) == {"train", "test"} and figures["train"]["pairs_in"] == 96
    shown = capsys.readouterr().out
    assert "train: 96 pairs in, 96 kept, dropped: none" in shown and shown.count("  chosen (") == 4, shown
    assert "offensive" not in shown, "the notice of HH's authors is shown with different data"


def test_controls_in_the_data_do_not_reach_the_terminal(task: Path, tmp_path: Path, capsys):
    row = {**GOOD, "chosen": " Yes\x1b[2J\x9b.", "a\x1b[31m": 1}
    inspect(task, write(tmp_path, row, GOOD), tmp_path / "figures.json")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x9b" not in shown, "a row of the data can clear the screen or colour it"
    assert "Yes\\x1b[2J\\x9b." in shown, "the data's text is not shown"
    with pytest.raises(SystemExit), report_errors():
        raise UserError("found \x1b[31m")
    assert capsys.readouterr().err == "error: found \\x1b[31m\n"


def test_figures_are_those_counted_by_hand(task: Path, tmp_path: Path, tiny_tokenizer: Any):
    def count(text: str) -> int:
        return len(tiny_tokenizer(text).input_ids)

    long = {"prompt": "\n\nHuman:" + " bread" * 60 + PROMPT, "chosen": " Yes.", "rejected": " flour" * 70}
    figures = inspect(task, write(tmp_path, GOOD, long), tmp_path / "figures.json", "--max_length", "66")["train"]
    question, before = count(PROMPT), count(long["prompt"])
    assert before > 66 > question, "the long prompt does not fill the budget"
    assert figures["questions_whole"] == 1.0
    assert figures["prompt_tokens_kept"] == pytest.approx(2 * question / (question + before))
    cut = 66 - question
    answers = {name: count(long[name]) + 1 for name in ("chosen", "rejected")}
    short = count(GOOD["chosen"]) + count(GOOD["rejected"]) + 2
    total = short + sum(answers.values())
    assert figures["completion_tokens_kept"] == pytest.approx((short + answers["chosen"] + cut) / total)
    assert figures["answers_whole"] == {"both": 0.5, "chosen": 0.5, "rejected": 0.0, "neither": 0.0}
    positions = question + (short + answers["chosen"] + cut) / 2
    assert figures["tokens_per_pair"]["shared_prefix"] == pytest.approx(positions)
    assert figures["tokens_per_pair"]["unpadded"] == pytest.approx(positions + question)
    assert figures["tokens_per_pair"]["padded"] == 132
    # Of the long pair the first 66 tokens hold no answer.
    assert figures["stock"] == {"pairs_kept": 1, "completion_tokens_kept": short / total, "questions_whole": 0.5}
    assert sum(figures["lengths"].values()) == 2 and figures["lengths"]["0-31"] == 1


def test_dropped_pairs_are_counted(task: Path, tmp_path: Path):
    same, empty = {**GOOD, "chosen": " No."}, {**GOOD, "chosen": ""}
    data = write(tmp_path, GOOD, same, empty, {"prompt": "Hi!", "response": " Yes."}, GOOD, "{broken")
    figures = inspect(task, data, tmp_path / "figures.json", "--on_bad_row", "skip")["train"]
    assert figures["dropped"] == {"broken row": 1, "empty completion": 1, "identical completions": 1}
    assert (figures["pairs_in"], figures["pairs_kept"]) == (6, 3)
    assert figures["questions_whole"] == figures["stock"]["questions_whole"] == 0.5, "a dropped pair must count as 0"
    with pytest.raises(UserError, match=r"train.jsonl row 6: expected one JSON object"):
        inspect(task, data, tmp_path / "figures.json")
