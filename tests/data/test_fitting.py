"""Fitting to the token budget: the rule, stated a second time by hand, and tokens of every kind of tokenizer."""

from typing import Any

import pytest
from datasets import Dataset
from examples import ALTERNATING, BAD, GOOD, MESSAGES, TURNS, render
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinydpo.data.fitting import (
    TokenizedPair,
    decode_completions,
    fit_pair,
    fit_pairs,
    get_bos_ids,
    tokenize_pairs,
    tokenize_prompts,
)
from tinydpo.data.rows import BrokenRow
from tinydpo.data.text import TEXT_FEATURES
from tinydpo.errors import UserError

END, BOS = 1000, 1001
tokens = st.lists(st.integers(0, 999), max_size=60)


@st.composite
def cases(draw: Any) -> tuple[TokenizedPair, int, int]:
    """A pair, max_length and max_question_length."""
    max_length = draw(st.integers(3, 48))
    bos = draw(st.sampled_from([[], [BOS]]))
    prompt = draw(tokens)
    completions = draw(st.lists(tokens, min_size=1, max_size=2))
    pair = TokenizedPair(bos, prompt, draw(st.integers(0, len(prompt))), completions, END)
    return pair, max_length, draw(st.integers(1, max_length - 1 - len(bos)))


@given(cases())
def test_the_rule(case: tuple[TokenizedPair, int, int]):
    """Token by token, no arithmetic shared with the code: prompt tokens leave from the front until the rule is met."""
    pair, max_length, max_question_length = case
    ended = [[*completion, END] for completion in pair.completions]
    sure = pair.prompt[-min(pair.question, max_question_length) :] if pair.question else []
    kept = list(pair.prompt)
    while len(kept) > len(sure) and any(len(pair.bos + kept + completion) > max_length for completion in ended):
        kept.pop(0)
    for completion in ended:
        while len(pair.bos + kept + completion) > max_length:
            completion.pop()
    assert fit_pair(*case) == (pair.bos + kept, ended), "pairs are fitted by another rule than the documented one"
    assert all(ended), "a completion is cut to nothing: the pair has lost its signal"


def words(bos: bool, end_last: bool = False, one_token: bool = False) -> PreTrainedTokenizerFast:
    """One token a word, number or mark; `<s>` first and `</s>` last where asked, `one_token` makes them the same."""
    start = "</s>" if one_token else "<s>"
    names = ["<s>", "</s>", "Human", "Assistant", ":", "?", "!", "<", ">", "/", "s", *(f"w{i}" for i in range(300))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    template = " ".join([start] * bos + ["$A"] + ["</s>"] * end_last)
    ids = [(name, names.index(name)) for name in dict.fromkeys((start, "</s>"))]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token="</s>", pad_token="</s>")


def texts(*rows: dict[str, Any]) -> Dataset:
    return Dataset.from_list(
        [{**dict.fromkeys(TEXT_FEATURES), "templated": False, **row} for row in rows], features=TEXT_FEATURES
    )


def numbered(count: int, first: int = 0) -> str:
    return "".join(f" w{first + i}" for i in range(count))


LONG = "\n\nHuman:" + numbered(60) + "\n\nAssistant: w1"
PAIR = {
    "prompt": LONG + "\n\nHuman: w7 w8 ?\n\nAssistant:",
    "question": len(LONG),
    "chosen": numbered(5, 100),
    "rejected": numbered(90, 200),
}


@pytest.mark.parametrize("bos", [False, True])
def test_fit_with_and_without_a_begin_token(bos: bool):
    tokenizer = words(bos)
    pair = fit_pairs(texts(PAIR), tokenizer, 32, 16, workers=1)[0]
    shown = tokenizer.decode(pair["prompt_ids"])
    question = ["Human", ":", "w7", "w8", "?", "Assistant", ":"]
    expected = tokenizer.convert_tokens_to_ids([*["<s>"] * bos, *question])
    assert pair["prompt_ids"] == expected, f"the prompt is not {'BOS and ' * bos}the last human turn, but {shown!r}"
    assert len(pair["prompt_ids"] + pair["rejected_ids"]) == 32, "the longer answer does not fill the budget"
    assert tokenizer.decode(pair["chosen_ids"]).endswith("</s>"), "a whole answer has no end token"
    assert tokenizer.eos_token_id not in pair["rejected_ids"], "a cut answer has an end token"
    assert tokenizer.bos_token_id not in pair["chosen_ids"], "an answer starts with a BOS token"
    alone = fit_pairs(texts({**PAIR, "rejected": None, "chosen": PAIR["rejected"]}), tokenizer, 32, 16, workers=1)[0]
    assert alone["prompt_ids"] == pair["prompt_ids"], "SFT's prompt is not its pair's"
    assert alone["chosen_ids"] == pair["rejected_ids"] and alone["rejected_ids"] == [], "a lone answer is misread"
    assert pair["prompt_tokens"] == 72 + bos, "the prompt's tokens are counted wrong"
    assert pair["completion_tokens"] == 6 + 91, "answers are not counted with their end tokens"


def test_begin_token_is_recognized():
    for flags in ({}, {"one_token": True}, {"end_last": True}):  # OPT's BOS and end token are one
        tokenizer = words(bos=True, **flags)
        assert get_bos_ids(tokenizer) == [tokenizer.bos_token_id], flags
    assert get_bos_ids(words(bos=False, end_last=True, one_token=True)) == [], "the end token is taken for a BOS token"


def test_template_that_writes_the_begin_token_itself():
    prompt = "<s> Human : w1 w2 ? Assistant :"
    row = {"prompt": prompt, "question": 0, "chosen": " w3", "rejected": " w4", "templated": True}
    pair = fit_pairs(texts(row), words(bos=True), 32, 16, workers=1)[0]
    assert pair["prompt_ids"].count(0) == 1, "the chat template's BOS token is doubled or lost"
    cut = fit_pairs(texts({**row, "chosen": numbered(90)}), words(bos=True), 8, 4, workers=1)[0]
    assert cut["prompt_ids"][0] == 0 and len(cut["prompt_ids"]) == 5, "the chat template's BOS token is cut away"


def test_special_tokens_in_a_plain_text_stay_text(gpt2_tokenizer: Any):
    prompt = "\n\nHuman: What is <|endoftext|>?\n\nAssistant:"
    row = {"prompt": prompt, "question": 0, "chosen": " <|endoftext|> ends a text.", "rejected": " No idea."}
    pair = fit_pairs(texts(row), gpt2_tokenizer, 64, 32, workers=1)[0]
    end = gpt2_tokenizer.eos_token_id
    assert end not in pair["prompt_ids"], "a prompt that names <|endoftext|> is read as ended"
    assert pair["chosen_ids"].count(end) == 1 and pair["chosen_ids"][-1] == end, "an answer ends in its middle"
    assert gpt2_tokenizer.decode(pair["prompt_ids"]) == prompt, "the prompt is not what the user wrote"
    templated = fit_pairs(texts({**row, "templated": True}), gpt2_tokenizer, 64, 32, workers=1)[0]
    assert end in templated["prompt_ids"], "special tokens that a chat template writes are read as plain text"


def test_text_that_cannot_stay_text_is_refused():
    """Unigram's special tokens are in the model's own vocabulary: their text gives them."""
    tokenizer = metaspace()
    for row in (
        {"prompt": "How are </s> you?", "chosen": " Well.", "rejected": " Bad."},
        {"prompt": "How are you?", "chosen": " Well. </s> Bad.", "rejected": " Bad."},
        {**MESSAGES, "chosen": [{"role": "assistant", "content": "Well. </s> Bad."}]},
    ):
        with pytest.raises(BrokenRow, match="expected text without special tokens, found '</s>'"):
            render(row, tokenizer)
    unknown = {"prompt": "How are you? 漢", "chosen": " Well.", "rejected": " Bad."}
    assert render(unknown, tokenizer)["prompt"] == unknown["prompt"], "an unknown character is refused"


def test_pairs_without_signal_are_named():
    same, long = numbered(40), numbered(40, 50)
    rows = [
        {"prompt": "w1", "question": 0, "chosen": " w2", "rejected": " w3"},
        {"prompt": "w1", "question": 0, "chosen": " w2", "rejected": " w2"},
        {"prompt": "w1", "question": 0, "chosen": same + " w2", "rejected": same + long},
        {"prompt": "w1", "question": 0, "chosen": "", "rejected": " w3"},
        {"prompt": "", "question": 0, "chosen": " w2", "rejected": " w3"},
        {"broken": "expected something else", "templated": None},
        {"prompt": "w1", "question": 0, "chosen": " w2"},
        {"prompt": "w1", "question": 0, "chosen": ""},
    ]
    named = {bos: fit_pairs(texts(*rows), words(bos), 32, 16, workers=1)["dropped"][:] for bos in (False, True)}
    identical, empty = "identical completions", "empty completion"
    expected = [None, identical, identical, empty, "empty prompt", "broken row", None, empty]
    assert named[False] == expected, "pairs are kept or dropped for another reason than they should"
    assert named[True][4] is None, "an empty prompt is dropped although BOS is before the answer"


def test_questions_are_counted_from_the_last_human_turn(gpt2_tokenizer: Any):
    for prompt in (LONG + "\n\nHuman: Why?\n\nAssistant:", "No turns at all", "\n\nHuman: 漢字 🙂?\n\nAssistant:", ""):
        start = max(prompt.rfind("\n\nHuman:"), 0)
        ids, questions = tokenize_prompts(texts({"prompt": prompt, "question": start}), gpt2_tokenizer)
        tail = gpt2_tokenizer.decode(ids[0][len(ids[0]) - questions[0] :])
        assert tail == prompt[start:], "the last human turn is taken to start elsewhere"


def test_budget_without_room_is_refused():
    for max_length, question, bos in ((1, 1, False), (64, 64, False), (64, 63, True)):
        with pytest.raises(UserError, match="max_question_length"):
            fit_pairs(texts(PAIR), words(bos), max_length, question, workers=1)
    assert fit_pairs(texts(PAIR), words(False), 64, 63, workers=1)["dropped"][:] == [None], "this one fits"


def test_another_budget_or_tokenizer_is_another_cache():
    rows = texts(PAIR)
    settings = ((False, 32, 16), (False, 32, 16), (True, 32, 16), (False, 33, 16), (False, 32, 17))
    fingerprints = [fit_pairs(rows, words(bos), *budget, workers=1)._fingerprint for bos, *budget in settings]
    assert fingerprints[0] == fingerprints[1], "the same pairs are tokenized twice"
    assert len(set(fingerprints)) == 4, "a changed budget or tokenizer is given the old tokens"


def test_whole_and_cut_answers_are_told_apart():
    """A whole answer's end token beside a cut one says nothing of what people prefer."""
    short, long = numbered(5, 100), numbered(90, 200)
    sides = [(short, numbered(7)), (short, long), (long, short), (long, long + " w1")]
    rows = [{**PAIR, "chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
    whole = fit_pairs(texts(*rows, {**PAIR, "rejected": None}), words(bos=False), 32, 16, workers=1)["whole"][:]
    assert whole == ["both", "chosen", "rejected", "neither", None], (
        "evaluation counts pairs of whole answers as cut, or the other way"
    )


# Prompt and answer are the tokens of the whole text

# Zephyr's and TinyLlama's: headers that are not single tokens, the end token ends a turn.
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "How are you? Well. Bad, very bad. Hi! Hello.",
    "\n\nHuman: Well?\n\nAssistant: Bad.",
    "<|user|>\n<|assistant|>",
]


def train(backend: Tokenizer, trainer: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(CORPUS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPECIAL = ["<unk>", "<s>", "</s>"]


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's way as newer files hold it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return train(backend, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>"))


def llama() -> PreTrainedTokenizerFast:
    """As Llama's and TinyLlama's files hold it: a normalizer, and no pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return train(backend, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))


def byte_level(prefix_space: bool) -> PreTrainedTokenizerFast:
    """GPT-2's way, and RoBERTa's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(backend, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))


TOKENIZERS = {
    "Metaspace": metaspace,
    "Llama's normalizer": llama,
    "bytes": lambda: byte_level(False),
    "bytes with a space first": lambda: byte_level(True),
}


@pytest.mark.parametrize("template", [ZEPHYR, ALTERNATING, None], ids=["headers", "no header", "texts"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_answer_are_the_tokens_of_the_whole(name: str, template: str | None):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = template
    text = render(MESSAGES, tokenizer)
    fitted = fit_pairs(texts(text), tokenizer, 512, 64, workers=1)[0]
    end = tokenizer.eos_token_id
    for side, answer in (("chosen", GOOD), ("rejected", BAD)):
        ids = fitted["prompt_ids"] + fitted[f"{side}_ids"]
        if template:
            rendered = tokenizer.apply_chat_template([*TURNS, *answer], tokenize=False)
            whole = tokenizer(rendered, add_special_tokens=False).input_ids
            whole = whole[: len(whole) - whole[::-1].index(end)]  # up to the last end token: a line may end after it
        else:
            plain = tokenizer(
                text["prompt"] + text[side], add_special_tokens=False, split_special_tokens=True
            ).input_ids
            whole = [*get_bos_ids(tokenizer), *plain, end]
        shown = tokenizer.convert_ids_to_tokens(ids), tokenizer.convert_ids_to_tokens(whole)
        assert ids == whole, f"{name}: {side} is not trained on as it is written: {shown[0]} for {shown[1]}"


@pytest.mark.parametrize("templated", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_decoded_answer_is_the_text_it_was_made_of(name: str, templated: bool):
    """SentencePiece drops the space after `Assistant:`, and DPO would train on tokens that the policy never wrote."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = ZEPHYR if templated else None
    text = render(MESSAGES, tokenizer)
    fitted = fit_pairs(texts(text), tokenizer, 512, 64, workers=1)
    ids = [ids[:-1] for ids in fitted["chosen_ids"]]
    (answer,) = decode_completions(ids, [templated], tokenizer)
    # The first token may span the prompt's end, as Llama's ":▁" does.
    assert (text["prompt"] + text["chosen"]).endswith(answer) and len(answer) >= len(text["chosen"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_that_spans_prompt_and_answer_goes_to_the_answers(name: str):
    """Both answers then still see one prompt, and its last human turn is counted without that token."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = {"prompt": "How are", "chosen": " you?", "rejected": "n't Well."}
    pair = {"templated": True, "question": 0, **rows}
    fitted = fit_pairs(texts(pair), tokenizer, 512, 64, workers=1)[0]
    for side in ("chosen", "rejected"):
        whole = tokenizer(rows["prompt"] + rows[side], add_special_tokens=False).input_ids
        assert fitted["prompt_ids"] + fitted[f"{side}_ids"][:-1] == whole, f"{name}: {side} is not the text's tokens"
    (pair,) = tokenize_pairs(texts(pair), tokenizer)
    assert pair.question == len(pair.prompt), f"{name}: a token of the answers counts as the question's"
