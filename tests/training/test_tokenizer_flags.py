"""SFT's flags that change tokenizer, template or loss act before the first row is tokenized."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import run
from toys import say, write_rows
from transformers import AutoTokenizer, GenerationConfig

from tinydpo.errors import UserError
from tinydpo.training import train as runs

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def sft(tiny_model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """One step of SFT into `tmp_path/run`; returns its trainer."""
    trainers, train = [], runs.train
    monkeypatch.setattr(runs, "train", lambda trainer, *rest: trainers.append(trainer) or train(trainer, *rest))
    monkeypatch.setattr("tinydpo.training.curves.draw_curves", lambda *args: None)

    def main(*flags: Any) -> Any:
        run("sft", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir",
            tmp_path / "run", "--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no",
            *flags)  # fmt: skip
        return trainers[-1]

    return main


def test_an_end_token_is_trained_on_and_saved(sft: Callable, tiny_tokenizer: Any, tmp_path: Path):
    with pytest.raises(UserError, match=r"^eos_token is '<nope>', which is not a token of "):
        sft("--eos_token", "<nope>")
    rows = sft("--eos_token", "!", "--completion_only_loss", "false").train_dataset
    assert rows[0]["labels"] == rows[0]["input_ids"], "the prompt carries no loss, although a flag asks for it"
    end = tiny_tokenizer.convert_tokens_to_ids("!")
    assert {row["labels"][-1] for row in rows} == {end}, "answers end otherwise than the saved tokenizer says"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "!", "the saved tokenizer ends otherwise"
    stops = np.atleast_1d(GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id)
    assert end in stops, "sampling from the saved model never stops at what it was trained to end with"


def test_a_chat_template_is_trained_on_and_saved(
    sft: Callable, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    answers = {"chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]}
    data = write_rows(tmp_path / "conversations", [{"prompt": [say("user", "Which?")], **answers}] * 20)
    with pytest.raises(UserError, match=r"^chat_template_path .*no\.jinja; give a \.jinja or \.j2 file"):
        sft("--dataset_name", data, "--chat_template_path", "no.jinja")
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    trainer = sft("--dataset_name", data, "--chat_template_path", file)
    row = trainer.train_dataset[0]
    assert row["labels"][0] == -100 and row["labels"][-1] == row["input_ids"][-1]
    text = trainer.processing_class.decode(row["input_ids"])
    assert text.startswith("[user] Which?") and "[assistant] yes" in text, f"trained on the wrong template: {text!r}"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == TEMPLATE, "saved with the wrong template"
    flags = ["--model_name_or_path", tiny_model, "--dataset_name", data, "--chat_template_path", file]
    importlib.import_module("inspect_data").main([*map(str, flags)])
    assert "[user] Which?" in capsys.readouterr().out, "`make inspect` shows other texts than SFT trains on"
