"""Conversations stay conversations for rewards, judges and readers, whatever the policy's template makes of them."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import judge_server
from toys import CHATML, GEMMA, say, steer, write_family, write_reward_model, write_rows
from transformers import AutoTokenizer

from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.rewards import load_rewards
from tinydpo.files import read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[say("system", "Be kind."), say("user", f"What goes into soup {i}?")] for i in range(4)]
SHOWN = [f"\n\nSystem: Be kind.\n\nHuman: What goes into soup {i}?\n\nAssistant:" for i in range(4)]
ROWS = [
    {"prompt": p, "chosen": [say("assistant", "Gladly! Carrots.")], "rejected": [say("assistant", "No.")]}
    for p in PROMPTS
]
MARKERS = ("<start>", "<end>", "<bos>", "<|im_", "model\n")
RECORDS = """
import json

def record(prompts, completions, completion_ids, **kwargs):
    with open("seen.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\\n" for row in zip(prompts, completions, completion_ids))
    return [0.0] * len(prompts)
"""


@pytest.fixture(scope="module")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy/` and `ref/`: turns end in `<end>`, as their answers soon do; `data/` holds conversations."""
    folder = tmp_path_factory.mktemp("gemma")
    write_rows(folder / "data", ROWS)
    for role, logit in (("policy", 9.0), ("ref", 8.0)):
        write_family(tiny_model, folder / role, GEMMA)
        steer(folder / role, AutoTokenizer.from_pretrained(folder / role).convert_tokens_to_ids("<end>"), logit)
    return folder


def script(name: str, folder: Path, data: Path, *argv: str) -> None:
    models = ["--model_name_or_path", f"{folder}/policy", "--ref_model_name_or_path", f"{folder}/ref"]
    importlib.import_module(name).main([*models, "--dataset_name", str(data), *argv])


def reward_score(folder: Path, model: Any, text: str) -> float:
    """Of a text whose special tokens are meant as such, alone, without padding."""
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (GEMMA, "<bos><start>system\nBe kind.<end>\n<start>user\nWhat goes into soup 0?<end>\n"
                "<start>model\nPeas.<end>\n"),
        (CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat goes into soup 0?<|im_end|>\n"
                 "<|im_start|>assistant\nPeas.<|im_end|>\n"),
        (None, "\n\nSystem: Be kind.\n\nHuman: What goes into soup 0?\n\nAssistant: Peas."),
    ],
)  # fmt: skip
def test_a_reward_model_reads_turns_in_its_own_template(
    template: str | None, expected: str, tiny_model: Path, tmp_path: Path
):
    model = write_reward_model(tiny_model, tmp_path / "reward", template)
    (reward,) = load_rewards(RewardArguments(reward_model_name_or_path=str(tmp_path / "reward")), "cpu", 2)
    long = [say("user", "word " * 300 + "the end?")]
    prompts, answers = [PROMPTS[0], long, "Plain: "], [[say("assistant", "Peas.")], [say("assistant", "Oh.")], "text"]
    scores = reward(prompts=prompts, completions=answers)
    assert scores[0] == pytest.approx(reward_score(tmp_path / "reward", model, expected), abs=1e-4), (
        "not the model's own template, or a second begin token"
    )
    begin = "<bos>" if template == GEMMA else ""  # its tokenizer's own, before plain text
    assert scores[2] == pytest.approx(reward_score(tmp_path / "reward", model, begin + "Plain: text"), abs=1e-4)
    if template == GEMMA:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
        whole = tokenizer(tokenizer.apply_chat_template(long + answers[1], tokenize=False), add_special_tokens=False)
        with torch.no_grad():
            cut = model(torch.tensor([whole.input_ids[:1] + whole.input_ids[-191:]])).logits.item()
        assert scores[1] == pytest.approx(cut, abs=1e-4), "cut to its length, a conversation loses begin or end"


def test_rewards_figures_and_readers_get_turns(
    gemma: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = write_reward_model(tiny_model, tmp_path / "reward", CHATML)
    (tmp_path / "recording_reward.py").write_text(RECORDS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    rewards = ["--reward_funcs", "recording_reward.record", "--reward_model_name_or_path", str(tmp_path / "reward")]
    script("evaluate", gemma, gemma / "data", "--output_dir", "run/evaluation", *rewards)

    results = json.loads(Path("run/evaluation/eval_results.json").read_text())
    assert results["ended_policy"] == results["ended_ref"] == 1.0, "answers that have ended count as cut"
    assert results["mean_length_policy"] < 10, "what comes after the end of a turn counts as answer"
    samples = read_jsonl(Path("run/evaluation/samples.jsonl"))
    assert [sample["prompt"] for sample in samples] == SHOWN, "a conversation is not shown as people read it"
    assert {sample["chosen"] for sample in samples} == {"Gladly! Carrots."}
    shown = json.dumps([{**sample, "pieces": None} for sample in samples]) + capsys.readouterr().out
    assert not [marker for marker in MARKERS if marker in shown], "readers see the template's markers"

    seen = [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]
    assert [prompt for prompt, *_ in seen] == PROMPTS * 2, "reward functions get no messages, as TRL's do"
    end = AutoTokenizer.from_pretrained(gemma / "policy").convert_tokens_to_ids("<end>")
    of_reward = AutoTokenizer.from_pretrained(tmp_path / "reward")
    for (prompt, completion, ids), sample in zip(seen[:4], samples, strict=True):
        assert completion == [say("assistant", sample["policy"])] and ids[-1] == end, "an answer is not the policy's"
        text = of_reward.apply_chat_template(prompt + completion, tokenize=False)
        assert sample["reward_policy"] == pytest.approx(reward_score(tmp_path / "reward", model, text), abs=1e-4)


def test_a_judge_reads_a_dialogue(gemma: Path, tmp_path: Path):
    pytest.importorskip("openai", reason="the judge's client is an extra: pip install '.[judge]'")
    with judge_server(lambda *_: "More helpful: A") as server:
        judge = ["--judge_base_url", server.url, "--judge_model", "scripted"]
        script("winrate", gemma, gemma / "data", *judge, "--output_dir", str(tmp_path / "run/winrate"))
    assert server.questions
    for question in server.questions:
        assert any(f"[conversation]\n{shown.strip()}\n" in question for shown in SHOWN)
        assert not [marker for marker in MARKERS if marker in question], "the judge reads a template's markers"
    against_chosen = [question for question in server.questions if "\nGladly! Carrots.\n" in question]
    assert len(against_chosen) >= 8, "the dataset's answers are not judged as they are"
