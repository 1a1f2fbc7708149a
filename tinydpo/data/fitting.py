"""Fit a pair to the token budget: no pair loses its signal, no question its end, and little of any answer is cut.

Cutting `prompt + completion` after its first 128 tokens makes 38 % of HH's pairs identical: the prompt alone fills the
budget. Here the prompt is sure of room for its last human turn only; then completions come first and keep their
start; what room is left goes to the prompt, which keeps its end.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from trl.data_utils import common_prefix_length

from tinydpo.data import CACHE_VERSION
from tinydpo.errors import UserError
from tinydpo.models.stop_tokens import get_end_token_id

Ids = list[int]
WHOLE = {(True, True): "both", (True, False): "chosen", (False, True): "rejected", (False, False): "neither"}
COUNTS = ("prompt_tokens", "completion_tokens", "longest_tokens", "stock_completion_tokens")
FITTED_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "chosen_ids": List(Value("int32")),
        "rejected_ids": List(Value("int32")),
        "subset": Value("string"),
        "dropped": Value("string"),  # why the pair carries no signal, else null
        "question_whole": Value("bool"),
        "whole": Value("string"),  # which answers were not cut: both, chosen, rejected, neither; null for one alone
        "stock_kept": Value("bool"),  # whether the stock rule (keep the first tokens) would have kept the pair
        **{name: Value("int32") for name in COUNTS},  # before fitting, BOS and end tokens included;
        # longest: prompt and longer completion; stock: after its cut
    }
)


def fit_pair(
    prompt: Sequence[int],
    question: int,
    completions: Sequence[Sequence[int]],
    *,
    end: int,
    bos: Sequence[int] = (),
    max_length: int,
    max_question_length: int,
) -> tuple[Ids, list[Ids]]:
    """Fit the completions of one prompt to `max_length` tokens each, prompt, BOS and end token counted.

    Args:
        prompt: the prompt's tokens, without BOS.
        question: how many tokens at the prompt's end are the last human turn.
        completions: tokens of the chosen and the rejected answer (or of one answer alone), without end token.
        end: the end token's id; it stays only where the completion is whole.
        bos: the BOS token if the tokenizer puts one first, else empty; it is never cut.
        max_length: the budget of prompt and one completion together.
        max_question_length: how much of the question is sure of room.

    Returns:
        The prompt that all completions see, BOS included, and the completions, end tokens included.
    """
    ended = [[*completion, end] for completion in completions]
    room = max_length - len(bos)
    keep = max(min(question, max_question_length), room - max(map(len, ended)))
    fitted_prompt = [*bos, *prompt[max(0, len(prompt) - keep) :]]
    return fitted_prompt, [completion[: max_length - len(fitted_prompt)] for completion in ended]


def keep_first_tokens(prompt: Sequence[int], completions: Sequence[Sequence[int]], max_length: int) -> list[Ids]:
    """What the stock rule (keep the first `max_length` tokens of prompt and completion) leaves of the completions."""
    return [list(completion)[: max(0, max_length - len(prompt))] for completion in completions]


def fit_pairs(texts: Dataset, tokenizer: Any, max_length: int, max_question_length: int, workers: int) -> Dataset:
    """Tokenize and fit text pairs, in the same order; pairs without signal stay, with the reason in `dropped`.

    Args:
        texts: the columns of `dialogues.TEXTS`.
        tokenizer: a fast tokenizer with an end token.
        max_length: tokens of prompt and one completion together.
        max_question_length: tokens of the last human turn that are sure of room, below `max_length`.
        workers: processes to tokenize with.

    Returns:
        The columns of `FITTED`, cached on disk by content.

    Raises:
        UserError: if the budget is not one.
    """
    if not max_length or max_length < 2:
        raise UserError(f"max_length is {max_length}, it must be a number of tokens of at least 2")
    bos = get_bos_ids(tokenizer)
    if max_question_length + len(bos) >= max_length:
        raise UserError(
            f"max_question_length ({max_question_length}) must be below max_length ({max_length})"
            f"{' by two, one is for the BOS token' if bos else ''}; pass a lower --max_question_length"
        )
    ends = {templated: get_end_token_id(tokenizer, templated) for templated in (False, True)}

    def fit_batch(batch: dict[str, list]) -> dict[str, list]:
        given, questions = tokenize_prompts(batch, tokenizer)
        prompts, completions = tokenize_completions(batch, given, tokenizer)
        rows = []
        for i, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
            alone = batch["rejected"][i] is None
            question = max(questions[i] - (len(given[i]) - len(prompt)), 0)
            first = bos if prompt[: len(bos)] == bos else []  # a chat template may write it itself, or none
            question, end = min(question, len(prompt) - len(first)), ends[bool(batch["templated"][i])]
            fitted_prompt, fitted = fit_pair(
                prompt[len(first) :], question, answers, end=end, bos=first,
                max_length=max_length, max_question_length=max_question_length,
            )  # fmt: skip
            whole = [len(part) > len(answer) for part, answer in zip(fitted, answers, strict=True)]
            stock = keep_first_tokens(prompt, [[*answer, end] for answer in answers], max_length)
            empty = not all(answers)  # a blank is an answer: some of HH's prefer it, or not, to words
            rows.append(
                {
                    "prompt_ids": fitted_prompt,
                    "chosen_ids": fitted[0],
                    "rejected_ids": [] if alone else fitted[1],
                    "subset": batch["subset"][i],
                    "dropped": _drop_reason(batch["broken"][i], empty, fitted_prompt, fitted),
                    "question_whole": len(fitted_prompt) - len(first) >= question,
                    "whole": None if alone else WHOLE[tuple(whole)],
                    "stock_kept": not empty and all(stock) and (alone or stock[0] != stock[1]),
                    "prompt_tokens": len(prompt),
                    "completion_tokens": sum(len(answer) + 1 for answer in answers) if not batch["broken"][i] else 0,
                    "longest_tokens": len(prompt) + max(map(len, answers)) + 1,
                    "stock_completion_tokens": sum(map(len, stock)),
                }
            )
        return {name: [row[name] for row in rows] for name in FITTED_FEATURES}

    key = (texts._fingerprint, tokenizer.backend_tokenizer.to_str(), bos, ends, max_length, max_question_length)
    fingerprint = Hasher.hash((*key, CACHE_VERSION))
    return texts.map(
        fit_batch, batched=True, remove_columns=texts.column_names, features=FITTED_FEATURES,
        num_proc=workers if workers > 1 else None, new_fingerprint=fingerprint,
        desc=f"Fitting pairs to {max_length} tokens",
    )  # fmt: skip


def _drop_reason(broken: str | None, empty: bool, prompt: Ids, completions: list[Ids]) -> str | None:
    if broken:
        return "broken row"
    if empty:
        return "empty completion"
    if not prompt:
        return "empty prompt"  # a completion's first token needs one before it to be scored
    if len(completions) == 2 and completions[0] == completions[1]:
        return "identical completions"
    return None


def get_bos_ids(tokenizer: Any) -> Ids:
    """The BOS token as a list if the tokenizer puts one before a text, else an empty list (GPT-2's does not)."""
    # Not from an empty text: there, an end token that a tokenizer puts last looks like a BOS token where they are one.
    plain, ids = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return ids[:1] if ids[: len(plain) + 1] == [tokenizer.bos_token_id, *plain] else []


def tokenize_prompts(texts: Any, tokenizer: Any) -> tuple[list[Ids], list[int]]:
    """Tokenize whole prompts, before any cut, with the BOS token where the tokenizer puts one.

    Args:
        texts: a dataset or batch with the columns `prompt`, `question` and `templated`.
        tokenizer: a fast tokenizer.

    Returns:
        One list of ids a prompt, and how many tokens at its end are the last human turn.
    """
    given, templated, starts = (texts[name][:] for name in ("prompt", "templated", "question"))
    prompts = [prompt or "" for prompt in given]
    bos, ids, questions = get_bos_ids(tokenizer), [], [0] * len(prompts)
    for special in (False, True):
        chosen = [i for i in range(len(prompts)) if bool(templated[i]) is special]
        if not chosen:
            continue
        encoded = _encode(tokenizer, [prompts[i] for i in chosen], special)
        for place, i in enumerate(chosen):
            tokens, start = encoded.input_ids[place], starts[i] or 0
            # Some tokenizers give white space no token of its own: the question then starts at the next one.
            covering = (encoded.char_to_token(place, at) for at in range(start, len(prompts[i])))
            first = next((token for token in covering if token is not None), len(tokens))
            questions[i] = len(tokens) - first
            ids.append((i, tokens if special or given[i] is None else [*bos, *tokens]))
    return [tokens for _, tokens in sorted(ids)], questions


def tokenize_completions(texts: Any, prompts: list[Ids], tokenizer: Any) -> tuple[list[Ids], list[list[Ids]]]:
    """Tokenize completions so that a prompt's tokens and theirs are those of the whole text.

    What a chat template writes is tokenized whole, and so is every text where the tokenizer puts a space before a text
    (SentencePiece's way): alone, a completion would begin with a space that is not there. Elsewhere completions are
    tokenized alone, as they go on from their prompt at inference. Plain text never turns into special tokens.

    Args:
        texts: a dataset or batch with the columns `prompt`, `chosen`, `rejected` (null for none) and `templated`.
        prompts: their tokens, as `tokenize_prompts` gives them.
        tokenizer: a fast tokenizer.

    Returns:
        The prompts' tokens, without those at their end that a completion's first token takes in, and the completions':
        a list of one or two for each.
    """
    columns = (texts[name][:] for name in ("prompt", "chosen", "rejected", "templated"))
    rows = [(prompt or "", [c] if r is None else [c, r], bool(t)) for prompt, c, r, t in zip(*columns, strict=True)]
    bos, spaced = get_bos_ids(tokenizer), adds_leading_space(tokenizer)
    ids: dict[tuple[int, int], Ids] = {}
    for special in (False, True):
        places = [(i, k) for i, (_, a, t) in enumerate(rows) if t is special for k, text in enumerate(a) if text]
        if places:
            given = [(rows[i][0] if special or spaced else "") + rows[i][1][k] for i, k in places]
            ids.update(zip(places, _encode(tokenizer, given, special).input_ids, strict=True))
    kept, completions = [], []
    for i, (prompt, (_, answers, special)) in enumerate(zip(prompts, rows, strict=True)):
        found = [ids.get((i, k), []) for k in range(len(answers))]
        if special or spaced:
            found = [tokens and [*bos * (not special), *tokens] for tokens in found]
            shared = min((common_prefix_length(prompt, tokens) for tokens in found if tokens), default=len(prompt))
            prompt, found = prompt[:shared], [tokens[shared:] for tokens in found]
        kept.append(prompt)
        completions.append(found)
    return kept, completions


@cache
def adds_leading_space(tokenizer: Any) -> bool:
    """Whether a text begins with a space that it does not have when it goes on from another."""
    alone, after = tokenizer(["a", "\na"], add_special_tokens=False).input_ids
    return after[-len(alone) :] != alone


def _encode(tokenizer: Any, texts: list[str], special: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=not special,
        verbose=False,  # a prompt longer than the model is no news: it is cut to the budget next
    )
