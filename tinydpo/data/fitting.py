"""Fit a pair to the token budget: both answers keep their signal, and the prompt keeps its last human turn.

Cutting `prompt + completion` after its first 128 tokens loses 38.3 % of HH's harmless-base test pairs, because the
prompt alone fills the budget. Here the last human turn is always kept (up to `max_question_length` tokens). Then
completions come first and keep their start. The room that is left goes to the prompt, which keeps its end.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from trl.data_utils import common_prefix_length

from tinydpo.data import CACHE_VERSION
from tinydpo.errors import UserError
from tinydpo.models.stop_tokens import get_end_token_id

Ids = list[int]
WHOLE = {(True, True): "both", (True, False): "chosen", (False, True): "rejected", (False, False): "neither"}
FITTED_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "chosen_ids": List(Value("int32")),
        "rejected_ids": List(Value("int32")),  # empty for SFT rows without one
        "whole": Value("string"),  # the answers that were not cut: both, chosen, rejected, neither; null for one alone
        "subset": Value("string"),
        "dropped": Value("string"),  # why the pair carries no signal, else null
        "prompt_tokens": Value("int32"),  # before fitting, with BOS
        "completion_tokens": Value("int32"),  # of both answers before fitting, with end tokens
    }
)


class TokenizedPair(NamedTuple):
    """A pair before fitting."""

    bos: Ids  # the BOS token where the tokenizer puts one first, else empty; it is never cut
    prompt: Ids  # without BOS
    question: int  # how many tokens at the prompt's end are the last human turn
    completions: list[Ids]  # chosen and rejected, or one answer alone, without end token
    end: int  # the end token's id; it stays only where the completion is whole


def fit_pair(pair: TokenizedPair, max_length: int, max_question_length: int) -> tuple[Ids, list[Ids]]:
    """Fit the completions of one prompt to `max_length` tokens each, prompt, BOS and end token counted.

    The last human turn is always kept, up to `max_question_length` tokens.

    Returns:
        The prompt that all completions see, BOS included, and the completions, end tokens included.
    """
    ended = [[*completion, pair.end] for completion in pair.completions]
    room = max_length - len(pair.bos) - max(map(len, ended))
    keep = max(room, min(pair.question, max_question_length))
    prompt = [*pair.bos, *pair.prompt[max(0, len(pair.prompt) - keep) :]]
    return prompt, [completion[: max_length - len(prompt)] for completion in ended]


def fit_pairs(texts: Dataset, tokenizer: Any, max_length: int, max_question_length: int, workers: int) -> Dataset:
    """Tokenize and fit text pairs (columns of `text.TEXT_FEATURES`), in the same order, cached on disk.

    Pairs without signal stay, with the reason in `dropped`. A budget without room for an answer is a UserError.
    """
    bos = get_bos_ids(tokenizer)
    if max_question_length + len(bos) >= (max_length or 0):
        raise UserError(
            f"max_question_length ({max_question_length}) and a BOS token must leave room below max_length "
            f"({max_length}); pass a lower --max_question_length"
        )

    def fit_batch(batch: dict[str, list]) -> dict[str, list]:
        rows: dict[str, list] = {name: [] for name in FITTED_FEATURES}
        for i, pair in enumerate(tokenize_pairs(batch, tokenizer)):
            broken = batch["broken"][i]
            prompt, completions = fit_pair(pair, max_length, max_question_length)
            is_pair = len(completions) == 2
            whole = tuple(len(cut) > len(given) for cut, given in zip(completions, pair.completions, strict=True))
            rows["prompt_ids"].append(prompt)
            rows["chosen_ids"].append(completions[0])
            rows["rejected_ids"].append(completions[1] if is_pair else [])
            rows["whole"].append(WHOLE[whole] if is_pair else None)
            rows["subset"].append(batch["subset"][i])
            rows["dropped"].append("broken row" if broken else _find_drop_reason(pair, prompt, completions))
            rows["prompt_tokens"].append(len(pair.bos) + len(pair.prompt))
            rows["completion_tokens"].append(0 if broken else sum(len(given) + 1 for given in pair.completions))
        return rows

    ends = [get_end_token_id(tokenizer, templated) for templated in (False, True)]
    budget = (max_length, max_question_length)
    key = (texts._fingerprint, tokenizer.backend_tokenizer.to_str(), bos, ends, budget, CACHE_VERSION)
    return texts.map(
        fit_batch, batched=True, remove_columns=texts.column_names, features=FITTED_FEATURES,
        num_proc=workers if workers > 1 else None, new_fingerprint=Hasher.hash(key),
        desc=f"Fitting pairs to {max_length} tokens",
    )  # fmt: skip


def _find_drop_reason(pair: TokenizedPair, prompt: Ids, completions: list[Ids]) -> str | None:
    if not all(pair.completions):  # white space is an answer: HH has pairs that prefer it to words, and the reverse
        return "empty completion"
    if not prompt:
        return "empty prompt"  # a completion's first token needs one before it to be scored
    if len(completions) == 2 and completions[0] == completions[1]:
        return "identical completions"
    return None


def tokenize_pairs(texts: Any, tokenizer: Any) -> list[TokenizedPair]:
    """Tokenize pairs (columns of `text.TEXT_FEATURES`) so that prompt and completion have the whole text's tokens.

    What a chat template writes is tokenized whole, and so is every text if the tokenizer puts a space before a text
    (as SentencePiece does): alone, a completion would begin with a space that is not there. Other completions are
    tokenized alone, as they continue their prompt at inference. Plain text never turns into special tokens.
    """
    bos = get_bos_ids(tokenizer)
    prompts, questions = tokenize_prompts(texts, tokenizer)
    columns = {name: texts[name][:] for name in ("prompt", "chosen", "rejected")}
    templated = [bool(value) for value in texts["templated"][:]]
    together = [value or adds_leading_space(tokenizer) for value in templated]
    ends = {value: get_end_token_id(tokenizer, value) for value in (False, True)}
    encodings = {}
    for name in ("chosen", "rejected"):
        given = [answer or "" for answer in columns[name]]
        for i, prompt in enumerate(columns["prompt"]):
            if together[i] and given[i]:
                given[i] = (prompt or "") + given[i]
        encodings[name] = _encode(given, templated, tokenizer)

    pairs = []
    for i, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        names = ("chosen",) if columns["rejected"][i] is None else ("chosen", "rejected")
        completions = [encodings[name][i].ids for name in names]
        if together[i]:
            before = [] if templated[i] else bos  # a chat template writes BOS itself
            wholes = [[*before, *ids] if ids else [] for ids in completions]
            # A token may span the prompt's end and a completion's start: it then belongs to the completions.
            shared = min((common_prefix_length(prompt, ids) for ids in wholes if ids), default=len(prompt))
            question = max(question - (len(prompt) - shared), 0)
            prompt = prompt[:shared]
            completions = [ids[shared:] for ids in wholes]
        first = bos if prompt[: len(bos)] == bos else []
        prompt = prompt[len(first) :]
        pairs.append(TokenizedPair(first, prompt, min(question, len(prompt)), completions, ends[templated[i]]))
    return pairs


def tokenize_prompts(texts: Any, tokenizer: Any) -> tuple[list[Ids], list[int]]:
    """Tokenize whole prompts (`prompt`, `question`, `templated`), with the BOS token where the tokenizer puts one.

    Returns one list of ids per prompt, and how many tokens at its end are the last human turn.
    """
    prompts = [prompt or "" for prompt in texts["prompt"][:]]
    templated = [bool(value) for value in texts["templated"][:]]
    starts = [start or 0 for start in texts["question"][:]]
    bos = get_bos_ids(tokenizer)
    ids = []
    questions = []
    for i, encoding in enumerate(_encode(prompts, templated, tokenizer)):
        # Some tokenizers give white space no token of its own: the question then starts at the next token.
        covering = (encoding.char_to_token(at) for at in range(starts[i], len(prompts[i])))
        first = next((token for token in covering if token is not None), len(encoding.ids))
        questions.append(len(encoding.ids) - first)
        ids.append(encoding.ids if templated[i] else [*bos, *encoding.ids])
    return ids, questions


def _encode(texts: list[str], templated: list[bool], tokenizer: Any) -> list[Any]:
    """A `tokenizers.Encoding` for each text; only what a chat template wrote may contain special tokens."""
    encodings: list[Any] = [None] * len(texts)
    for special in set(templated):
        places = [i for i, value in enumerate(templated) if value is special]
        batch = tokenizer(
            [texts[i] for i in places],
            add_special_tokens=False,
            split_special_tokens=not special,
            verbose=False,  # no warning of a prompt longer than the model: it is cut next
        )
        for i, encoding in zip(places, batch.encodings, strict=True):
            encodings[i] = encoding
    return encodings


def decode_completions(ids: Sequence[Ids], templated: Sequence[bool], tokenizer: Any) -> list[str]:
    """The texts of completions without special tokens, as they continue their prompts.

    SentencePiece drops the space at the start of a text. A completion in plain text keeps its own here, by decoding it
    after another token. In a chat, the template writes what stands between prompt and answer.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    anchor = tokenizer("a", add_special_tokens=False).input_ids
    skip = len(tokenizer.decode(anchor, **options))
    starts = [[] if is_templated else anchor for is_templated in templated]
    decoded = tokenizer.batch_decode([[*start, *one] for start, one in zip(starts, ids, strict=True)], **options)
    return [text[skip:] if start else text for start, text in zip(starts, decoded, strict=True)]


@cache
def adds_leading_space(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before a text, which is not there when the text continues a prompt."""
    alone, after = tokenizer(["a", "\na"], add_special_tokens=False).input_ids
    return after[-len(alone) :] != alone


def get_bos_ids(tokenizer: Any) -> Ids:
    """The BOS token as a list if the tokenizer puts one before a text, else an empty list (GPT-2's does not)."""
    # Not from an empty text: there, an end token that a tokenizer puts last looks like a BOS token if they are one.
    plain = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    return ids[:1] if ids[: len(plain) + 1] == [tokenizer.bos_token_id, *plain] else []
