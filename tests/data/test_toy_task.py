"""The toy task: the same data for a seed, honest splits and noise, and a gold reward that ranks sensibly."""

import math
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinydpo.files import read_jsonl
from tinydpo.toy_task import build_base_model, gold_reward, write_dialogues

BREAD = "\n\nHuman: How do I bake bread? My flat is tiny.\n\nAssistant:"
GOOD = (
    " Happy to help! First, knead the dough for ten minutes. Then let the loaf rise for two hours. "
    "After that, slash the crust three times. Enjoy!"
)


def split(dialogue: str) -> tuple[str, str]:
    prompt, mark, answer = dialogue.rpartition("\n\nAssistant:")
    return prompt + mark, answer


def reward(prompt: str, completion: str) -> float:
    return gold_reward([prompt], [completion])[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dialogues(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_base_model(folder, read_jsonl(data / "train.jsonl"), seed=0)
    return folder


def test_seed_decides_every_byte(data: Path, base: Path, tmp_path: Path):
    rows = read_jsonl(data / "train.jsonl")
    for seed, is_same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        write_dialogues(folder, seed)
        build_base_model(folder, rows, seed)
        for before in (data / "train.jsonl", data / "test.jsonl", base / "model.safetensors"):
            equal = (folder / before.name).read_bytes() == before.read_bytes()
            assert equal == is_same, f"seed {seed} beside seed 0: {before.name} {'equal' if equal else 'different'}"


def test_rows_are_whole_dialogues_of_hh(data: Path):
    rows = read_jsonl(data / "train.jsonl") + read_jsonl(data / "test.jsonl")
    for row in rows:
        (prompt, chosen), (other_prompt, rejected) = split(row["chosen"]), split(row["rejected"])
        assert prompt == other_prompt, f"the two answers of a pair have different prompts: {row}"
        assert chosen != rejected, f"chosen and rejected are the same, which teaches nothing: {row}"
        assert prompt.startswith("\n\nHuman: "), f"not HH's form: {row}"
        assert chosen.startswith(" ") and rejected.startswith(" "), f"an answer without its leading space: {row}"
    two_turns = mean(row["chosen"].count("\n\nHuman:") == 2 for row in rows)
    assert 0.1 < two_turns < 0.4, f"{two_turns:.0%} of the dialogues have two turns; HH-like data needs some"


def test_no_question_is_both_trained_on_and_held_out(data: Path):
    questions = {}
    for name in ("train", "test"):
        prompts = [split(row["chosen"])[0] for row in read_jsonl(data / f"{name}.jsonl")]
        questions[name] = [prompt.rpartition("\n\nHuman:")[2] for prompt in prompts]
    assert not set(questions["train"]) & set(questions["test"]), "held-out questions leak into training"
    assert len(set(questions["test"])) == len(questions["test"]) >= 512, "held-out questions repeat"


def test_preferences_are_as_noisy_as_bradley_and_terry_say(data: Path):
    rows = read_jsonl(data / "train.jsonl") + read_jsonl(data / "test.jsonl")
    margins = [reward(*split(row["chosen"])) - reward(*split(row["rejected"])) for row in rows]
    agreement = mean(margin > 0 for margin in margins)
    expected = mean(1 / (1 + math.exp(-abs(margin))) for margin in margins)
    assert 0.75 < agreement < 0.92, f"chosen is the better answer in {agreement:.1%} of pairs: not as people are"
    five_standard_errors = 5 * 0.5 / len(margins) ** 0.5  # of 2,912 coin flips
    assert abs(agreement - expected) < five_standard_errors, f"{agreement:.3f} is not σ(r1 - r2)'s {expected:.3f}"
    assert mean(margin == 0 for margin in margins) < 0.01, "too many ties for win rates"


WORSE = {
    "off topic": GOOD.replace("dough", "tyre").replace("loaf", "tent").replace("crust", "soup"),
    "vague": " Happy to help! It all depends. Somehow it works out. You just need some stuff. Enjoy!",
    "inexact": GOOD.replace("ten ", "several ").replace("two ", "several ").replace("three ", "several "),
    "rude": GOOD.replace("Happy to help!", "What a stupid question.").replace("Enjoy!", "Do not bother me again."),
    "cut off": GOOD[:60],
    "said three times": GOOD * 3,
    "padded out": GOOD + " People say so. I think so too. So it is. That is so. So be it. And so on.",
    "empty": "",
    "garbled": " stu skemall fill Rememb\ufffd hope onion ahead tur\ufffd stro wa l\ufffdRe ide bre\ufffd fri plat",
}


@pytest.mark.parametrize("name", WORSE)
def test_worse_answer_scores_less(name: str):
    assert reward(BREAD, GOOD) > reward(BREAD, WORSE[name]), f"an answer that is {name} scores as much as a good one"


def test_last_human_turn_sets_the_topic():
    tent = "\n\nHuman: How do I pitch a tent?"
    asked_last = f"{tent}\n\nAssistant: First, hammer in four pegs.{BREAD}"
    asked_first = f"{BREAD} First, knead the dough for ten minutes.{tent}\n\nAssistant:"
    assert reward(asked_last, GOOD) == reward(BREAD, GOOD), "an earlier turn changes the score of the same answer"
    assert reward(asked_first, GOOD) < reward(asked_last, GOOD) - 2, "answering the earlier question is not penalised"


long_answers = st.integers(0, 400).map(lambda n: "bread two. " * n)


@given(st.text() | st.just(BREAD), st.text() | st.text(alphabet=".!? \n") | long_answers)
def test_any_text_gets_a_finite_score(prompt: str, completion: str):
    (value,) = gold_reward([prompt], [completion], completion_ids=[[0]], trainer_state=None)
    assert isinstance(value, float) and math.isfinite(value)


def test_base_model_is_a_gpt2_whose_budget_fits_the_dialogues(base: Path, data: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    assert 2e6 < model.num_parameters() < 5e6, f"{model.num_parameters():,} parameters: too slow or too dull"
    assert model.config.vocab_size == len(tokenizer), "ids that the model lacks, or rows that no token uses"
    assert model.config.eos_token_id == tokenizer.eos_token_id, "sampling would not stop at the end token"
    longest = max(len(tokenizer(row[side])["input_ids"]) for row in read_jsonl(data / "train.jsonl") for side in row)
    assert longest < 128, f"the longest dialogue has {longest} tokens and its end token: quickstart's 128 would cut it"
