"""The toy task: the DPO paper's controlled-sentiment experiment in miniature, with a true reward that is known.

On real preferences nobody can say whether DPO made the answers better, because the reward behind the clicks is hidden.
Here a small grammar writes HH-style dialogues, a gold reward scores the answers, and preferences are drawn from it
with Bradley-Terry noise. A GPT-2 of 2.9 million parameters learns it from scratch on two CPU cores in minutes, through
the same scripts and trainers as the real recipes (`make quickstart`), and the gold reward says whether it worked.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

END_TOKEN = "<|endoftext|>"

# topic: what the question asks for | steps of an answer. The topic's word is in the task; {n} is a number slot.
_TOPICS = {
    "bread": "bake bread | knead the dough for {n} minutes | let the loaf rise for {n} hours"
    " | dust the tin with {n} spoons of flour | slash the crust {n} times",
    "soup": "cook lentil soup | simmer the lentils for {n} minutes | chop {n} carrots | stir in {n} pinches of cumin"
    " | soften {n} onions in oil",
    "pancakes": "make pancakes | whisk {n} eggs into the batter | flip each pancake after {n} minutes"
    " | melt {n} knobs of butter | serve {n} on a plate with syrup",
    "coffee": "brew coffee | grind {n} scoops of beans | rinse the filter {n} times | pour slowly in {n} circles"
    " | let the grounds bloom for {n} breaths",
    "tomatoes": "grow tomatoes | tie each vine to {n} stakes | pinch out {n} side shoots a week"
    " | give every pot {n} cups of water | wait until {n} trusses are ripe",
    "tulips": "plant tulips | bury each bulb {n} fingers deep | space them {n} inches apart"
    " | mix {n} buckets of sand into the soil | expect flowers after {n} months",
    "suitcase": "pack a suitcase | roll {n} shirts tightly | fill {n} shoes with socks"
    " | leave {n} pairs of trousers at home | weigh it {n} times on the scales",
    "train": "plan a train trip | book the tickets {n} weeks ahead | choose a route with {n} changes"
    " | reach the platform {n} minutes early | reserve {n} seats near the window",
    "tent": "pitch a tent | hammer in {n} pegs | tighten {n} ropes against the wind"
    " | slide {n} poles through the sleeves | camp {n} steps above the stream",
    "tyre": "fix a flat tyre | loosen the rim with {n} levers | glue {n} patches over the hole"
    " | pump it with {n} strong strokes | check the tube for {n} bubbles",
    "tap": "stop a dripping tap | turn off {n} valves under the sink | replace {n} rubber washers"
    " | undo {n} screws with a spanner | wrap the thread in {n} turns of tape",
    "wall": "paint a wall | sand the plaster for {n} minutes | roll on {n} thin coats"
    " | cover {n} sockets with masking paper | wash {n} brushes at the end",
    "exam": "prepare for an exam | solve {n} old papers | revise {n} chapters a day"
    " | explain {n} ideas to a classmate | sleep {n} hours the night before",
    "essay": "write an essay | sketch an outline with {n} points | quote {n} sources"
    " | draft {n} paragraphs in one go | delete {n} weak adjectives",
    "guitar": "practise the guitar | tune {n} strings | strum {n} chords slowly"
    " | set a metronome for {n} bars | play one song {n} times",
    "puppy": "raise a puppy | reward it with {n} treats | walk it {n} times a day"
    " | keep each lesson short, with {n} breaks | teach it {n} commands like sit",
}
TOPICS = {topic: tuple(entry.split(" | ")) for topic, entry in _TOPICS.items()}
QUESTIONS = (
    "How do I {}?", "How should I {}?", "What is the best way to {}?", "Can you help me {}?",
    "Could you tell me how to {}?", "Any advice on how to {}?", "I want to {}. Where do I begin?",
    "What do I need to know to {}?", "I have never tried to {}. Any tips?", "My friend asked me to {}. What now?",
)  # fmt: skip
CIRCUMSTANCES = (
    "", " I only have one evening.", " I have very little money.", " There are small children around.",
    " My flat is tiny.", " I am rather impatient.", " It went wrong last time.", " It is a surprise for my mother.",
    " Keep it simple for me.", " I am a complete beginner.", " I would like company.", " I have all weekend.",
)  # fmt: skip
FIRST_FRAMES = ("First, {}.", "I would {}.", "You can {}.", "To begin, {}.")
LATER_FRAMES = ("Then {}.", "Next, {}.", "After that, {}.", "Remember to {}.")
VAGUE_SENTENCES = (
    "It all depends.", "Somehow it works out.", "Do whatever feels right.", "You just need some stuff.",
    "People try all sorts of things.", "Maybe it is easy.", "It probably takes a while.", "Just look things up.",
)  # fmt: skip
KIND_OPENERS = ("Happy to help!", "Glad you asked!", "What a lovely idea!", "Thanks for asking!")
KIND_CLOSERS = ("Good luck!", "Enjoy!", "I hope this helps.", "You are welcome to ask again.")
RUDE_OPENERS = ("What a stupid question.", "Obviously you are lazy.", "This is boring.", "Why bother me with this?")
RUDE_CLOSERS = ("Do not bother me again.", "What a waste of time.", "Only a fool would ask.", "Stop being lazy.")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "ten")
INEXACT = ("a few", "several")
KIND = {"happy", "glad", "lovely", "thanks", "luck", "enjoy", "hope", "welcome", "please"}
RUDE = {"stupid", "lazy", "obviously", "boring", "bother", "waste", "fool", "idiot"}
VAGUE = {"depends", "somehow", "whatever", "stuff", "things", "maybe", "probably"}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


_FUNCTION_WORDS = "above after before each every give into keep like make near over stop them through under until with"


def _topic_words() -> dict[str, frozenset[str]]:
    """Words of four letters or more that one topic alone uses: each says which topic an answer is about."""
    used = {topic: {topic, *_words(" ".join(entry))} for topic, entry in TOPICS.items()}
    users = Counter(word for words in used.values() for word in words)
    common = {*_words(_FUNCTION_WORDS), *(word for word, count in users.items() if count > 1 or len(word) < 4)}
    return {topic: frozenset({topic, *(words - common)}) for topic, words in used.items()}


TOPIC_WORDS = _topic_words()
ALL_TOPIC_WORDS = frozenset().union(*TOPIC_WORDS.values())


def gold_reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """The true reward of each completion, in the form of TRL's reward functions (`GRPOTrainer(reward_funcs=...)`).

    With sentences parted at ``.!?`` and the topic read off the last human turn of the prompt::

        reward = 2.5 · (on − off) / (on + off + 1)    on, off: words particular to this topic, to any other topic
               + 0.9 · min(details, 3)                different on-topic sentences that give a number
               + 1.0 · courtesy                       1 kind, −1 rude, 0 neither or both
               − 0.8 · min(vague, 3)                  sentences such as "It all depends."
               − 0.6 · min(rambling, 6)               sentences beyond the sixth, and repeated ones
               − 0.6 · |ln(words / 30)|               too short and too long both cost
               − 0.6 · unfinished                     1 if it does not end in . ! or ?

    Args:
        prompts: texts of B dialogues up to and including the last ``\\n\\nAssistant:``.
        completions: texts of the B answers.
        kwargs: ignored; TRL passes every other column of the dataset here.

    Returns:
        B finite floats in log-odds: by Bradley and Terry (1952) a difference of 1 is preferred with odds of e to 1.
    """
    return [_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    question = set(_words(prompt.rpartition("\n\nHuman:")[2]))
    # A question about none of the topics has no on-topic words: every topic's words count as off topic there.
    own = next((TOPIC_WORDS[topic] for topic in TOPICS if topic in question), frozenset())
    sentences = [tuple(_words(part)) for part in re.split(r"[.!?]+", completion) if _words(part)]
    distinct = [set(sentence) for sentence in dict.fromkeys(sentences)]
    on = sum(word in own for words in distinct for word in words)
    off = sum(word in ALL_TOPIC_WORDS - own for words in distinct for word in words)
    details = sum(bool(own & s) and any(w in NUMBERS or w.isdigit() for w in s) for s in distinct)
    used = set().union(*distinct)
    vague = sum(bool(VAGUE & set(sentence)) for sentence in sentences)
    rambling = max(0, len(sentences) - 6) + len(sentences) - len(distinct)
    return (
        2.5 * (on - off) / (on + off + 1)
        + 0.9 * min(details, 3)
        + 1.0 * (bool(KIND & used) - bool(RUDE & used))
        - 0.8 * min(vague, 3)
        - 0.6 * min(rambling, 6)
        - 0.6 * abs(math.log(max(1, sum(map(len, sentences))) / 30))
        - 0.6 * (not completion.rstrip().endswith((".", "!", "?")))
    )


def _write_step(rng: random.Random, position: int, step: str, exactness: float) -> str:
    frame = rng.choice(LATER_FRAMES if position else FIRST_FRAMES)
    return frame.format(step.format(n=rng.choice(NUMBERS if rng.random() < exactness else INEXACT)))


def _write_answer(rng: random.Random, topic: str) -> str:
    """An answer of varied quality: on topic or not, concrete or vague, kind, neutral or rude, short or rambling."""
    subject = topic if rng.random() < 0.7 else rng.choice(list(TOPICS))
    concreteness = rng.choice((0.3, 0.6, 0.9))
    exactness = rng.choice((0.2, 0.8))
    steps = rng.sample(TOPICS[subject][1:], 4)
    body = [
        _write_step(rng, i, step, exactness) if rng.random() < concreteness else rng.choice(VAGUE_SENTENCES)
        for i, step in enumerate(steps[: rng.choice((1, 2, 2, 3, 3, 4))])
    ]
    openers, closers = rng.choice(((KIND_OPENERS, KIND_CLOSERS), (RUDE_OPENERS, RUDE_CLOSERS), ((), ())))
    opener = [rng.choice(openers)] if openers and rng.random() < 0.6 else []
    closer = [rng.choice(closers)] if closers and rng.random() < 0.6 else []
    return " ".join([*opener, *body, *closer])


def _write_pair(rng: random.Random, topic: str, question: str) -> dict[str, str]:
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    if rng.random() < 0.2:
        earlier = rng.choice([name for name in TOPICS if name != topic])
        task, *steps = TOPICS[earlier]
        reply = _write_step(rng, 0, rng.choice(steps), 0.5)
        prompt = f"\n\nHuman: {rng.choice(QUESTIONS).format(task)}\n\nAssistant: {reply}{prompt}"
    first = _write_answer(rng, topic)
    second = _write_answer(rng, topic)
    while second == first:
        second = _write_answer(rng, topic)
    margin = _score(prompt, first) - _score(prompt, second)
    if rng.random() >= 1 / (1 + math.exp(-margin)):
        first, second = second, first
    return {"chosen": f"{prompt} {first}", "rejected": f"{prompt} {second}"}


def write_dialogues(folder: Path, seed: int, train_pairs: int = 2400, test_pairs: int = 512) -> None:
    """Write `train.jsonl` and `test.jsonl` into `folder`, in the whole-dialogue form of Anthropic's HH-RLHF.

    Each row has the two dialogues of a pair, the same up to the last ``\\n\\nAssistant:``. Which answer is chosen is
    drawn from Bradley and Terry (1952), eq. 1 of the DPO paper (arXiv 2305.18290):
    p(first ≻ second) = exp(r₁) / (exp(r₁) + exp(r₂)), where r is `gold_reward`. A question (task, form and
    circumstance) is in one of the files only; in test.jsonl each occurs once. The same seed writes the same bytes.
    """
    rng = random.Random(seed)
    questions = [
        (topic, form.format(TOPICS[topic][0]) + circumstance)
        for topic, form, circumstance in product(TOPICS, QUESTIONS, CIRCUMSTANCES)
    ]
    if test_pairs >= len(questions):
        raise ValueError(f"test_pairs must be below {len(questions)}, the number of different questions: {test_pairs}")
    rng.shuffle(questions)
    held_out = questions[:test_pairs]
    known = questions[test_pairs:]
    trained = [known[i % len(known)] for i in range(train_pairs)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, asked in (("test", held_out), ("train", trained)):
        lines = [json.dumps(_write_pair(rng, topic, question)) + "\n" for topic, question in asked]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_base_model(folder: Path, rows: Iterable[dict[str, str]], seed: int) -> None:
    """Save an untrained GPT-2 of 2.9 million parameters, and a byte-level BPE tokenizer trained on the rows' texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1280, special_tokens=[END_TOKEN], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator((row[side] for row in rows for side in ("chosen", "rejected")), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, eos_token=END_TOKEN, pad_token=END_TOKEN
    )
    tokenizer.save_pretrained(folder)
    set_seed(seed)
    end = tokenizer.eos_token_id
    # Two wide layers run faster on a CPU than four narrow ones of as many parameters; dropout would slow learning.
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=192, n_embd=320, n_layer=2, n_head=5,
        bos_token_id=end, eos_token_id=end, pad_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_task(data: Path, base: Path, seed: int, **sizes: int) -> None:
    """Write the dialogues into `data` (`sizes` as for `write_dialogues`) and the untrained model into `base`."""
    write_dialogues(data, seed, **sizes)
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    build_base_model(base, map(json.loads, rows), seed)
