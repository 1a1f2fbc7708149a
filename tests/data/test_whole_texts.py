"""A prompt's tokens and its answer's are those of the whole text, for every kind of tokenizer."""

from typing import Any

import pytest
from test_dialogues import ALTERNATING, BAD, GOOD, TURNS
from test_fitting import texts
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinydpo.data.fitting import fit_pairs, get_bos_ids
from tinydpo.data.text import render_row

# Zephyr's and TinyLlama's: headers that are no tokens of their own, the end token ends a turn.
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = [
    "How are you? Well. Bad, very bad. Hi! Hello.",
    "\n\nHuman: Well?\n\nAssistant: Bad.",
    "<|user|>\n<|assistant|>",
]
PAIR = {"prompt": TURNS, "chosen": GOOD, "rejected": BAD}


def trained(backend: Tokenizer, trainer: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(CORPUS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPECIAL = ["<unk>", "<s>", "</s>"]


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """SentencePiece's way as newer files hold it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return trained(backend, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL))


def llama() -> PreTrainedTokenizerFast:
    """As Llama's and TinyLlama's files hold it: a normalizer, and no pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(backend, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return trained(backend, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>"))


def byte_level(prefix_space: bool) -> PreTrainedTokenizerFast:
    """GPT-2's way, and RoBERTa's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(backend, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet))


TOKENIZERS = {
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, first": lambda: metaspace("first"),
    "Metaspace, never": lambda: metaspace("never"),
    "Llama's normalizer": llama,
    "Unigram": unigram,
    "bytes": lambda: byte_level(False),
    "bytes with a space first": lambda: byte_level(True),
}


@pytest.mark.parametrize("template", [ZEPHYR, ALTERNATING, None], ids=["headers", "no header", "texts"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_answer_are_the_tokens_of_the_whole(name: str, template: str | None):
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = template
    text = render_row(PAIR, tokenizer, True)
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


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_that_spans_prompt_and_answer_goes_to_the_answers(name: str):
    """Both answers then still see one prompt, and its last human turn is counted without that token."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = {"prompt": "How are", "chosen": " you?", "rejected": "n't Well."}
    pair = {"templated": True, "question": 0, **rows}
    fitted = fit_pairs(texts(pair), tokenizer, 512, 64, workers=1)[0]
    for side in ("chosen", "rejected"):
        whole = tokenizer(rows["prompt"] + rows[side], add_special_tokens=False).input_ids
        assert fitted["prompt_ids"] + fitted[f"{side}_ids"][:-1] == whole, f"{name}: {side} is not the text's tokens"
    assert fitted["question_whole"], f"{name}: a question that was kept whole is counted as cut"
