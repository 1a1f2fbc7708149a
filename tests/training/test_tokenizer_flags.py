"""SFT's flags that change tokenizer, template or loss act before the first row is tokenized."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import run
from transformers import AutoTokenizer, GenerationConfig

from tinydpo.errors import UserError
from tinydpo.training import train as runs

pytestmark = pytest.mark.usefixtures("one_thread")
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
    with pytest.raises(UserError, match=r"^eos_token is '<nope>', which is no token of "):
        sft("--eos_token", "<nope>")
    rows = sft("--eos_token", "!").train_dataset
    end = tiny_tokenizer.convert_tokens_to_ids("!")
    assert {row["labels"][-1] for row in rows} == {end}, "answers end otherwise than the saved tokenizer says"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "!", "the saved tokenizer ends otherwise"
    stops = np.atleast_1d(GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id)
    assert end in stops, "sampling from the saved model never stops at what it was trained to end with"


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    def turns(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer}]

    file = tmp_path / "conversations.jsonl"
    file.write_text(
        "".join(json.dumps({"chosen": turns(f"yes {i}"), "rejected": turns(f"no {i}")}) + "\n" for i in range(40))
    )
    return file


def test_a_chat_template_is_trained_on_and_saved(sft: Callable, conversations: Path, tmp_path: Path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    trainer = sft("--dataset_name", conversations, "--chat_template_path", file)
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith("[user] Which?") and "[assistant] yes" in text, f"trained on another template: {text!r}"
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == TEMPLATE, "saved with another template"


def test_a_chat_template_that_cannot_act_is_one_sentence(
    sft: Callable, conversations: Path, tiny_model: Path, tmp_path: Path
):
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    for path, error in {
        "no.jinja": r"^chat_template_path .*no\.jinja; give a \.jinja or \.j2 file",
        tiny_model: r"^chat_template_path .*another model's folder has chat_template\.jinja",
        tmp_path / "broken.jinja": r"row \d+: .*chat template accepts.*end of template",
    }.items():
        with pytest.raises(UserError, match=error):
            sft("--dataset_name", conversations, "--chat_template_path", path)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [[], ["--completion_only_loss", "false"]])
def test_prompts_carry_loss_on_request_only(flags: list[str], sft: Callable):
    row = sft(*flags).train_dataset[0]
    assert row["labels"][-1] == row["input_ids"][-1]
    assert (row["labels"][0] == row["input_ids"][0]) == bool(flags)
