"""What ends an answer, in one place: for training data, sampling, metrics and the configs that are saved.

A model may have several stop tokens. Chat models end a turn with one (Gemma's `<end_of_turn>`, Phi's `<|end|>`) and a
text with another, the tokenizer's `eos_token`; their generation config lists both.
"""

import re
from functools import lru_cache
from typing import Any, NamedTuple

PROBE = "tinydpo"  # an answer that no template has in its own text


class TurnEnd(NamedTuple):
    """What a chat template writes after an answer: a text, and the token that ends the turn, at `start` in it."""

    text: str
    start: int
    token: str
    token_id: int


def find_turn_end(tokenizer: Any) -> TurnEnd | None:
    """How the chat template ends an assistant's turn; None without a template, or if it uses no token for that."""
    if tokenizer.chat_template is None:
        return None
    return _find_turn_end(tokenizer, str(tokenizer.chat_template), tokenizer.eos_token, len(tokenizer))


@lru_cache(maxsize=16)
def _find_turn_end(tokenizer: Any, *cache_key: Any) -> TurnEnd | None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        _, probe, text = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(PROBE)
    except Exception:  # a template is a program and may raise anything; the first row that it refuses is named then
        return None
    ids = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    longest_first = sorted(ids, key=len, reverse=True)
    match = re.search("|".join(map(re.escape, longest_first)), text) if ids and probe else None
    return TurnEnd(text, match.start(), match[0], ids[match[0]]) if match else None


def get_end_token_id(tokenizer: Any, templated: bool) -> int:
    """The token that training puts at the end of a whole answer: the chat template's, or the tokenizer's end token."""
    end = find_turn_end(tokenizer) if templated else None
    return end.token_id if end else tokenizer.eos_token_id


def strip_turn_end(tokenizer: Any, text: str) -> str:
    """An answer as the chat template writes it, up to the token that ends the turn (see `get_end_token_id`)."""
    end = find_turn_end(tokenizer)
    if end and text.endswith(end.text):
        return text[: len(text) - len(end.text) + end.start]
    return text.rstrip().removesuffix(end.token if end else tokenizer.eos_token)


def get_stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer of a model: the tokenizer's, the chat template's, and its generation config's."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    ends = [tokenizer.eos_token_id, get_end_token_id(tokenizer, templated=True), *listed]
    return list(dict.fromkeys(end for end in ends if end is not None))


def reset_generation_config(model: Any, tokenizer: Any) -> None:
    """Make a saved model sample from its own distribution, and stop where it has learned to.

    The config is built from scratch: transformers' default keeps the 50 likeliest tokens, and a checkpoint's own may
    hold a repetition penalty, forced tokens or anything else that reshapes what the model has learned.
    """
    from transformers import GenerationConfig

    stops = get_stop_token_ids(model, tokenizer)
    before = model.generation_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else before.pad_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else before.bos_token_id
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad, bos_token_id=bos,
        eos_token_id=stops if len(stops) > 1 else stops[0],
    )  # fmt: skip
