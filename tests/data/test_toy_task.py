"""The toy task: the same data for a seed, honest splits and noise, and a gold reward that ranks sensibly."""

import json
import math
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinydpo.toy_task import TOPICS, build_base_model, gold_reward, write_dialogues

BREAD = "\n\nHuman: How do I bake bread? My flat is tiny.\n\nAssistant:"
GOOD = (
    " Happy to help! First, knead the dough for ten minutes. Then let the loaf rise for two hours. "
    "After that, slash the crust three times. Enjoy!"
)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(dialogue: str) -> tuple[str, str]:
    prompt, mark, answer = dialogue.rpartition("\n\nAssistant:")
    return prompt + mark, answer


def question(dialogue: str) -> str:
    return split(dialogue)[0].rpartition("\n\nHuman:")[2]


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
    build_base_model(folder, read(data / "train.jsonl"), seed=0)
    return folder


def test_the_seed_decides_every_byte(data: Path, tmp_path: Path):
    write_dialogues(tmp_path / "same", seed=0)
    write_dialogues(tmp_path / "other", seed=1)
    for name in ("train.jsonl", "test.jsonl"):
        written = (data / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == written, f"seed 0 wrote another {name} the second time"
        assert (tmp_path / "other" / name).read_bytes() != written, f"seeds 0 and 1 wrote the same {name}"


def test_rows_are_whole_dialogues_of_hh(data: Path):
    rows = read(data / "train.jsonl") + read(data / "test.jsonl")
    for row in rows:
        (prompt, chosen), (other_prompt, rejected) = split(row["chosen"]), split(row["rejected"])
        assert prompt == other_prompt, f"the two answers of a pair have different prompts: {row}"
        assert chosen != rejected, f"chosen and rejected are the same, which teaches nothing: {row}"
        assert prompt.startswith("\n\nHuman: "), f"not HH's form, so the dialogue split would refuse it: {row}"
        assert chosen.startswith(" ") and rejected.startswith(" "), f"an answer without its leading space: {row}"
    two_turns = mean(row["chosen"].count("\n\nHuman:") == 2 for row in rows)
    assert 0.1 < two_turns < 0.4, f"{two_turns:.0%} of the dialogues have two turns; HH-like data needs some"


def test_no_question_is_both_trained_on_and_held_out(data: Path):
    train, test = ([question(row["chosen"]) for row in read(data / f"{name}.jsonl")] for name in ("train", "test"))
    assert not set(train) & set(test), f"held-out questions leak into training: {sorted(set(train) & set(test))[:3]}"
    assert len(set(test)) == len(test) >= 512, "held-out questions repeat, so 512 answers are fewer than 512 prompts"


def test_holding_out_every_question_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="test_pairs must be below"):
        write_dialogues(tmp_path, seed=0, test_pairs=10**6)


def test_preferences_are_as_noisy_as_bradley_and_terry_say(data: Path):
    margins = [
        reward(*split(row["chosen"])) - reward(*split(row["rejected"]))
        for row in read(data / "train.jsonl") + read(data / "test.jsonl")
    ]
    agreement = mean(margin > 0 for margin in margins)
    expected = mean(1 / (1 + math.exp(-abs(margin))) for margin in margins)
    assert 0.75 < agreement < 0.92, f"chosen is the better answer in {agreement:.1%} of pairs: not as people are"
    # Five standard errors of 2,912 coin flips.
    assert abs(agreement - expected) < 5 * 0.5 / len(margins) ** 0.5, (
        f"{agreement:.3f} is not sigma(r1 - r2)'s {expected:.3f}"
    )
    ties = mean(margin == 0 for margin in margins)
    assert ties < 0.01, f"the gold reward calls {ties:.1%} of pairs a tie: too coarse for win rates"


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("off topic", GOOD.replace("dough", "tyre").replace("loaf", "tent").replace("crust", "soup")),
        (
            "about another topic",
            " Happy to help! First, hammer in four pegs. Then slide six poles through the sleeves. Enjoy!",
        ),
        ("vague", " Happy to help! It all depends. Somehow it works out. You just need some stuff. Enjoy!"),
        ("inexact", GOOD.replace("ten ", "several ").replace("two ", "several ").replace("three ", "several ")),
        (
            "rude",
            GOOD.replace("Happy to help!", "What a stupid question.").replace("Enjoy!", "Do not bother me again."),
        ),
        ("neutral", GOOD.replace(" Happy to help!", "").replace(" Enjoy!", "")),
        ("cut off", GOOD[:60]),
        ("missing its end", GOOD.rstrip("!")),
        ("said three times", GOOD * 3),
        ("padded out", GOOD + " People say so. I think so too. So it is. That is so. So be it. And so on."),
        ("one word", " Bread."),
        ("empty", ""),
        (
            "garbled",
            " stu skemall fill Rememb\ufffd hope onion ahead tur\ufffd stro wa l\ufffdRe ide bre\ufffd fri plat",
        ),
    ],
)
def test_a_worse_answer_scores_less(name: str, worse: str):
    good, bad = reward(BREAD, GOOD), reward(BREAD, worse)
    assert good > bad, f"an answer that is {name} scores {bad:.2f}, the good one only {good:.2f}"


def test_the_last_human_turn_sets_the_topic():
    tent = "\n\nHuman: How do I pitch a tent?"
    asked_last = f"{tent}\n\nAssistant: First, hammer in four pegs.{BREAD}"
    asked_first = f"{BREAD} First, knead the dough for ten minutes.{tent}\n\nAssistant:"
    assert reward(asked_last, GOOD) == reward(BREAD, GOOD), "an earlier turn changes the score of the same answer"
    assert reward(asked_first, GOOD) < reward(asked_last, GOOD) - 2, "answering the earlier question is not penalised"


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_can_be_answered_well(topic: str):
    task, *steps = TOPICS[topic]
    prompt = f"\n\nHuman: How do I {task}?\n\nAssistant:"
    answer = " Glad you asked! " + " ".join(f"Then {step.format(n='five')}." for step in steps)
    others = [f"\n\nHuman: How do I {TOPICS[other][0]}?\n\nAssistant:" for other in TOPICS if other != topic]
    best_elsewhere = max(reward(other, answer) for other in others)
    assert reward(prompt, answer) > 3, f"a full answer about {topic} scores {reward(prompt, answer):.2f} only"
    assert reward(prompt, answer) > best_elsewhere + 2, f"the {topic} answer scores {best_elsewhere:.2f} off topic"


@given(
    st.lists(
        st.tuples(
            st.one_of(st.text(), st.just(BREAD)),
            st.one_of(st.text(), st.text(alphabet=".!? \n"), st.integers(0, 400).map(lambda n: "bread two. " * n)),
        ),
        max_size=5,
    )
)
def test_any_text_gets_a_finite_score(texts: list[tuple[str, str]]):
    prompts, completions = [p for p, _ in texts], [c for _, c in texts]
    rewards = gold_reward(prompts, completions, completion_ids=[[0]] * len(texts), trainer_state=None)
    assert len(rewards) == len(texts), "TRL needs one reward for each completion"
    for (prompt, completion), value in zip(texts, rewards, strict=True):
        assert isinstance(value, float) and math.isfinite(value), f"reward {value!r} for {prompt!r} {completion!r}"


def test_prompts_without_their_completions_are_refused():
    with pytest.raises(ValueError):
        gold_reward([BREAD, BREAD], [GOOD])


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_loses_nothing(base: Path, text: str):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for sample in (text, "Enjoy 🍞👩‍🍳, it's naïve !  你好\n\nAssistant: "):
        decoded = tokenizer.decode(tokenizer(sample)["input_ids"])
        assert decoded == sample, f"answers would be printed changed: {sample!r} came back as {decoded!r}"


def test_the_base_model_loads_as_a_gpt2_of_a_few_million_parameters(base: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    assert 2e6 < model.num_parameters() < 5e6, f"{model.num_parameters():,} parameters: too slow or too dull"
    assert model.config.vocab_size == len(tokenizer), "ids that the model lacks, or rows that no token uses"
    assert model.config.eos_token_id == tokenizer.eos_token_id, "sampling would not stop at the end token"
    assert tokenizer("Hi")["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"], "tokens are added"


def test_a_pair_fits_the_recipes_budget(base: Path, data: Path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    longest = max(len(tokenizer(row[side])["input_ids"]) for row in read(data / "train.jsonl") for side in row)
    assert longest < 128, f"the longest dialogue has {longest} tokens and its end token: quickstart's 128 would cut it"


def test_the_seed_decides_the_weights(base: Path, data: Path, tmp_path: Path):
    rows = read(data / "train.jsonl")
    for seed, same in ((0, True), (1, False)):
        build_base_model(tmp_path / str(seed), rows, seed=seed)
        equal = (tmp_path / str(seed) / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
        assert equal == same, f"seed {seed} beside seed 0: weights {'equal' if equal else 'different'}"
