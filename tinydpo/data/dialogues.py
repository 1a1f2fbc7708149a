"""A row in any of the usual forms becomes one text pair: prompt, chosen, rejected, and where the question starts.

The forms: whole HH dialogues (`chosen`/`rejected`), `prompt` with `chosen`/`rejected` texts, `prompt` with
`completion` or `response` (SFT only), and conversations (lists of messages), with or without `prompt`.
"""

import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from tinydpo.data.records import BrokenRow, decode, kind
from tinydpo.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURNS = {"system": "\n\n", "user": HUMAN, "assistant": ASSISTANT}
TEXTS = Features(
    {
        "prompt": Value("string"),
        "question": Value("int64"),  # where in the prompt the last human turn starts, in characters
        "chosen": Value("string"),
        "rejected": Value("string"),  # null for SFT rows without one
        "messages": Value("string"),  # the messages of a conversation's prompt as JSON, null for texts
        "templated": Value("bool"),  # written by a chat template: special tokens in the text are meant as such
        "subset": Value("string"),
        "broken": Value("string"),  # why a skipped row could not be read, else null
    }
)


def to_texts(records: Dataset, tokenizer: Any, need_pairs: bool, on_bad_row: str, workers: int) -> Dataset:
    """Read records into text pairs (the columns of `TEXTS`), in the same order.

    Args:
        records: columns `file`, `row`, `subset`, `record`, as `sources.load_records` gives them.
        tokenizer: its chat template writes conversations; without one they take HH's `Human:`/`Assistant:` form.
        need_pairs: whether a row must have a rejected answer (DPO, evaluation).
        on_bad_row: `"stop"` or `"skip"`; a skipped row is kept as an empty one with its reason in `broken`.
        workers: processes to read with.

    Raises:
        UserError: for the first broken row, naming file, row and what was expected.
    """

    def read(batch: dict[str, list]) -> dict[str, list]:
        texts = {name: [] for name in TEXTS}
        for file, row, subset, record in zip(*(batch[k] for k in ("file", "row", "subset", "record")), strict=True):
            try:
                text = text_pair(decode(record), tokenizer, need_pairs)
            except BrokenRow as error:
                if on_bad_row == "stop":
                    advice = "mend it or pass --on_bad_row skip"
                    raise UserError(f"{file} row {row}: {error}; {advice}") from None
                text = {"broken": str(error).encode(errors="replace").decode()}
            text = {"subset": subset, **text}
            for name in TEXTS:
                texts[name].append(text.get(name))
        return texts

    key = (records._fingerprint, tokenizer.chat_template, tokenizer.special_tokens_map, need_pairs, on_bad_row)
    with open(__file__, "rb") as source:
        fingerprint = Hasher.hash((*key, source.read()))
    return records.map(
        read, batched=True, remove_columns=records.column_names, features=TEXTS,
        num_proc=workers if workers > 1 else None, new_fingerprint=fingerprint, desc="Reading pairs",
    )  # fmt: skip


def text_pair(row: dict[str, Any], tokenizer: Any, need_pairs: bool) -> dict[str, Any]:
    """Turn one row into `prompt`, `question`, `chosen`, `rejected` and `templated` (see `TEXTS`).

    Raises:
        BrokenRow: if the row has none of the known forms, saying what was expected.
    """
    if "chosen" in row or "rejected" in row or need_pairs or "prompt" not in row:
        answers = {"chosen": row.get("chosen"), "rejected": row.get("rejected")}
        missing = [name for name in answers if name not in row]
        if missing:
            found = ", ".join(map(repr, list(row)[:6])) or "none"
            forms = "'chosen' and 'rejected'" + ("" if need_pairs else ", or 'prompt' and 'completion'")
            raise BrokenRow(f"expected the keys {forms}; {missing[0]!r} is missing (keys found: {found})")
    else:
        key = "completion" if "completion" in row else "response"
        if key not in row:
            raise BrokenRow("expected 'completion' or 'response' beside 'prompt'")
        answers = {key: row[key]}
    if all(isinstance(answer, list) for answer in answers.values()):
        pair = _from_messages(row.get("prompt"), answers, tokenizer)
    else:
        for name, answer in {**({"prompt": row["prompt"]} if "prompt" in row else {}), **answers}.items():
            if not isinstance(answer, str):
                raise BrokenRow(f"expected {name!r} to be a string, found {kind(answer)}")
        prompt, completions = (row["prompt"], answers) if "prompt" in row else split_dialogues(answers)
        pair = {"prompt": prompt, "question": max(prompt.rfind(HUMAN), 0), "templated": False, **_named(completions)}
    if isinstance(row.get("subset"), str):
        pair["subset"] = row["subset"]
    for name in ("prompt", "chosen", "rejected", "subset"):
        try:
            (pair.get(name) or "").encode()
        except UnicodeEncodeError:
            raise BrokenRow(f"expected valid text in {name!r}, found half of a character") from None
    return pair


def split_dialogues(dialogues: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Split whole HH dialogues at the last assistant turn that starts the same in all of them.

    Dialogues of a pair may part before their last turn; a cut at the chosen one's prompt would garble the rejected.

    Raises:
        BrokenRow: if they share no assistant turn.
    """
    shared = _shared_start(dialogues.values())
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise BrokenRow(f"expected dialogues that share a prompt up to {ASSISTANT!r}, found no shared assistant turn")
    end = start + len(ASSISTANT)
    return shared[:end], {name: dialogue[end:] for name, dialogue in dialogues.items()}


def _shared_start(texts: Iterable[str]) -> str:
    first, last = min(texts := list(texts)), max(texts)  # what the extremes share, all share
    low, high = 0, len(first)
    while low < high:  # by halves: letter by letter takes seconds on 160,000 dialogues
        middle = (low + high + 1) // 2
        low, high = (middle, high) if last.startswith(first[low:middle], low) else (low, middle - 1)
    return first[:low]


def _from_messages(prompt: Any, answers: dict[str, list], tokenizer: Any) -> dict[str, Any]:
    for name, messages in {**answers, **({"prompt": prompt} if isinstance(prompt, list) else {})}.items():
        _check_messages(name, messages)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is not None and not isinstance(prompt, list):
        raise BrokenRow(f"expected 'prompt' to be a string or a list of messages, found {kind(prompt)}")
    if not prompt or any(messages[0]["role"] != "assistant" for messages in answers.values()):
        # The answers hold the whole conversation; a `prompt` beside them only names it.
        prompt, answers = _split_conversations(answers)
    said = json.dumps(prompt)
    if tokenizer.chat_template is None:
        text = "".join(map(_hh_turn, prompt)) + ASSISTANT
        texts = {k: "".join(map(_hh_turn, messages)).removeprefix(ASSISTANT) for k, messages in answers.items()}
        return {
            "prompt": text,
            "question": max(text.rfind(HUMAN), 0),
            "templated": False,
            "messages": said,
            **_named(texts),
        }
    for message in (message for messages in (prompt, *answers.values()) for message in messages):
        if found := _special_tokens(tokenizer).search(message["content"]):
            told = f"expected messages without the model's special token {found.group()!r} in their text"
            raise BrokenRow(f"{told}: between the template's own it would be read as that token")
    wholes = {name: _render(tokenizer, [*prompt, *messages]) for name, messages in answers.items()}
    text = _shared_start([_render(tokenizer, prompt, add_generation_prompt=True), *wholes.values()])
    # The template ends a turn with the end token; fitting puts it back where the completion stays whole.
    texts = {k: whole[len(text) :].rstrip().removesuffix(tokenizer.eos_token) for k, whole in wholes.items()}
    # A template may end turns with another token than the end token: an answer without a word is empty all the same.
    texts = {k: text if any(message["content"] for message in answers[k]) else "" for k, text in texts.items()}
    question = _template_question(tokenizer, prompt, text)
    return {"prompt": text, "question": question, "templated": True, "messages": said, **_named(texts)}


def _check_messages(name: str, messages: list) -> None:
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BrokenRow(f"expected {name!r} to hold messages with the strings 'role' and 'content'")
    if not messages:
        raise BrokenRow(f"expected {name!r} to hold at least one message, found an empty list")


def _split_conversations(answers: dict[str, list]) -> tuple[list, dict[str, list]]:
    """Split whole conversations before the last assistant message that follows the same messages in all of them."""
    first, *others = answers.values()
    for start in range(min(map(len, answers.values())) - 1, 0, -1):
        shared = all(messages[:start] == first[:start] for messages in others)
        if shared and all(messages[start]["role"] == "assistant" for messages in answers.values()):
            return first[:start], {name: messages[start:] for name, messages in answers.items()}
    raise BrokenRow("expected conversations that share a prompt before an assistant message")


def _hh_turn(message: dict[str, str]) -> str:
    turn, content = TURNS.get(message["role"]), message["content"]
    if turn is None:
        raise BrokenRow(
            f"expected the roles {', '.join(TURNS)} (the model has no chat template), found {message['role']!r}"
        )
    return f"{turn} {content}" if content and turn.endswith(":") else turn + content


@cache
def _special_tokens(tokenizer: Any) -> re.Pattern:
    tokens = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(tokens) or r"(?!)")


def _render(tokenizer: Any, messages: list, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's: it may raise anything
        raise BrokenRow(f"expected messages that the model's chat template accepts, it says: {error}") from None


def _template_question(tokenizer: Any, prompt: list, text: str) -> int:
    """Where the last user message starts, its header included."""
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        return 0
    upto = prompt[: last + 1]
    # Said twice, a message adds exactly itself and its header: so the default system turn that some templates put
    # before a first message does not count as part of the question. Templates that insist on alternating roles get an
    # answer in between.
    for between in ([], [{"role": "assistant", "content": "-"}]):
        try:
            once, twice = (_render(tokenizer, [*upto, *between, *more]) for more in ([], [prompt[last]]))
            return min(max(len(_render(tokenizer, upto)) - (len(twice) - len(once)), 0), len(text))
        except BrokenRow:
            continue
    return 0


def _named(texts: dict[str, str]) -> dict[str, str | None]:
    chosen, *rejected = texts.values()
    return {"chosen": chosen, "rejected": rejected[0] if rejected else None}
