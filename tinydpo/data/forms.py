"""A row in any form that has one meaning becomes a prompt and its answers: texts, or lists of messages.

The forms: whole HH dialogues (`chosen`/`rejected`); `prompt` with `chosen`/`rejected`; conversations, lists of
messages, in the same keys, with or without `prompt`; OpenAI's (`input.messages`, `preferred_output`,
`non_preferred_output`) and axolotl's (`messages`, then one message each); for SFT `prompt` with `completion` or
`response`, or `messages`. What else a column may mean is not guessed: the message names it, and `--column` and
`--role` say what it is.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tinydpo.data.conversations import Message, prepend_system, normalize_messages, split_conversations
from tinydpo.data.records import BrokenRow, describe_type, printable, unwrap_openai_row

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MIN_REPEATED_WORDS = 4  # words from which a prompt that opens its answers is taken for a copy: "Thank you" may well be answered so
REPEATED_PROMPT_NOTE = "answers repeat the prompt, which is taken once"
REWARD_COLUMNS = ("reward_chosen", "reward_rejected")  # what on-policy pairs were made by, and not for training to see


@dataclass
class ParsedRow:
    """A row as read: texts, or a conversation.

    `answers` are by the key they stood under, the chosen one first. `system` is what stood beside texts, empty where
    that key holds nothing (a conversation has it among its messages), `tools` and `options` are for the chat template,
    and `notes` say what of the row was not taken as it stands.
    """

    prompt: str | list[Message]
    answers: dict[str, Any]
    system: str | None = None
    tools: list | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_row(row: dict[str, Any], need_pairs: bool | None) -> ParsedRow:
    """Read a row.

    Args:
        row: decoded, under the names used here (`records.rename`).
        need_pairs: whether a row must have a rejected answer. False, for SFT, gives the chosen answer's own last turn
            where it has several, after all that comes before: the human's turns are not to be learned. None takes
            pairs as pairs, and other rows too.

    Raises:
        BrokenRow: if the row has none of the known forms, saying what was expected.
    """
    row = unwrap_openai_row(row)
    answers = _find_answers(row, need_pairs)
    asked = "prompt"
    if row.get("prompt") is None and "messages" not in answers and all(map(_is_continuation, answers.values())):
        asked = "messages"  # axolotl's
    system = row["system"] or "" if "system" in row else None
    if not isinstance(system, str | None):
        raise BrokenRow(f"expected 'system' to be a string, found {describe_type(system)}")
    if all(isinstance(answer, list) for answer in answers.values()):
        form = _parse_conversation(row.get(asked), answers, system)
    else:
        form = _parse_texts(row, answers, system, need_pairs)
    if need_pairs is False:
        form.prompt, form.answers = _keep_last_turn(form.prompt, form.answers)
    form.tools = _decode_json_column(row, "tools", list) or None
    form.options = {k: v for k, v in (_decode_json_column(row, "chat_template_kwargs", dict) or {}).items() if v is not None}
    read_too = {"prompt", asked, *answers, "system", "tools", "chat_template_kwargs", "subset", *REWARD_COLUMNS}
    form.notes += [unread_column_note(key) for key, value in row.items() if key not in read_too and _has_content(value)]
    return form


def unread_column_note(name: str) -> str:
    """The note on a column that has no meaning here."""
    return f"column {printable(name)!r} is not read"


def split_dialogues(dialogues: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Split whole HH dialogues at the last assistant turn that starts the same in all of them.

    Dialogues of a pair may part before their last turn; a cut at the chosen one's prompt would garble the rejected.

    Raises:
        BrokenRow: if they share no assistant turn.
    """
    shared = common_prefix(dialogues.values())
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise BrokenRow(f"expected dialogues that share a prompt up to {ASSISTANT!r}, found no shared assistant turn")
    end = start + len(ASSISTANT)
    return shared[:end], {name: dialogue[end:] for name, dialogue in dialogues.items()}


def common_prefix(texts: Iterable[str]) -> str:
    """The longest text that all of them start with."""
    first, last = min(texts := list(texts)), max(texts)  # what the extremes share, all share
    low, high = 0, len(first)
    while low < high:  # by halves: letter by letter takes seconds on 160,000 dialogues
        middle = (low + high + 1) // 2
        low, high = (middle, high) if last.startswith(first[low:middle], low) else (low, middle - 1)
    return first[:low]


def _find_answers(row: dict[str, Any], need_pairs: bool | None) -> dict[str, Any]:
    """The answers by their keys; a message alone is a list of one."""
    if need_pairs or "chosen" in row or "rejected" in row:
        missing = [name for name in ("chosen", "rejected") if name not in row]
        if not missing:
            asked = isinstance(row.get("messages"), list) or isinstance(row.get("prompt"), list)
            answers = {name: row[name] for name in ("chosen", "rejected")}
            alone = {name for name, one in answers.items() if isinstance(one, dict) and (asked or "role" in one)}
            return {name: [one] if name in alone else one for name, one in answers.items()}
        wanted = ("prompt", *missing)
    elif row.get("messages") is not None and row.get("completion") is None and row.get("response") is None:
        if not isinstance(row["messages"], list):
            raise BrokenRow(f"expected 'messages' to be a list of messages, found {describe_type(row['messages'])}")
        return {"messages": row["messages"]}
    elif "prompt" in row:
        key = "completion" if "completion" in row else "response"
        if key not in row:
            raise BrokenRow("expected 'completion' or 'response' beside 'prompt'" + _suggest_columns(row, "completion"))
        return {key: row[key]}
    else:
        missing, lists = ["chosen"], any(isinstance(value, list) for value in row.values())
        wanted = ("messages",) if lists else ("prompt", "completion")
    found = ", ".join(map(repr, list(row)[:6])) or "none"
    forms = "'chosen' and 'rejected'" + ("" if need_pairs else ", or 'prompt' and 'completion', or 'messages'")
    told = f"expected the keys {forms}; {missing[0]!r} is missing (keys found: {found})"
    raise BrokenRow(told + _suggest_columns(row, *wanted))


def _is_continuation(answer: Any) -> bool:
    """Whether an answer is messages that go on from a prompt, and no whole conversation."""
    return (
        isinstance(answer, list)
        and bool(answer)
        and isinstance(answer[0], dict)
        and (answer[0].get("role") == "assistant")
    )


def _parse_conversation(prompt: Any, answers: dict[str, list], system: str | None) -> ParsedRow:
    answers = {name: normalize_messages(name, messages) for name, messages in answers.items()}
    if isinstance(prompt, list):
        prompt = normalize_messages("prompt", prompt) if prompt else None
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        raise BrokenRow(f"expected 'prompt' to be a string or a list of messages, found {describe_type(prompt)}")
    if not prompt or not all(map(_is_continuation, answers.values())):
        # The answers hold the whole conversation; a `prompt` beside them only names it.
        prompt, answers = split_conversations(answers)
    for name, messages in answers.items():
        if (role := messages[-1]["role"]) != "assistant":
            raise BrokenRow(f"expected {name!r} to end in an assistant message, found one by {printable(role)!r} there")
    return ParsedRow(prepend_system(system, prompt), answers)


def _parse_texts(row: dict[str, Any], answers: dict[str, Any], system: str | None, need_pairs: bool | None) -> ParsedRow:
    for name, text in {**({"prompt": row["prompt"]} if "prompt" in row else {}), **answers}.items():
        if not isinstance(text, str):
            lists = {key: value for key, value in row.items() if isinstance(value, list)}
            told = f"expected {name!r} to be a string, found {describe_type(text)}"
            raise BrokenRow(told + _suggest_columns(lists, "messages") * isinstance(text, dict))
    notes = []
    if "prompt" not in row:
        try:
            prompt, answers = split_dialogues(answers)
        except BrokenRow as error:
            raise BrokenRow(f"{error}{_suggest_columns(row, 'prompt')}") from None
    else:
        prompt = row["prompt"]
        if _repeats_prompt(prompt, answers.values()):
            answers, notes = {name: text[len(prompt) :] for name, text in answers.items()}, [REPEATED_PROMPT_NOTE]
    if "prompt" not in row or (need_pairs is False and HUMAN in prompt):
        for name, text in answers.items():
            if text.rfind(HUMAN) > text.rfind(ASSISTANT):
                raise BrokenRow(f"expected {name!r} to end in an assistant turn, found one of the human's there")
    return ParsedRow(prompt, answers, system, notes=notes)


def _repeats_prompt(prompt: str, answers: Iterable[str]) -> bool:
    """Whether answers hold the whole text, prompt included, and are none that happen to begin like it."""
    if not prompt.strip() or not all(text.startswith(prompt) for text in answers):
        return False
    if HUMAN in prompt:
        return True
    rests = [text[len(prompt) :] for text in answers]
    apart = prompt[-1].isspace() or not any(rest and not rest[0].isspace() for rest in rests)
    return apart and len(prompt.split()) >= MIN_REPEATED_WORDS


def _keep_last_turn(prompt: Any, answers: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The chosen answer's own last turn, and all before it, where the answer has several."""
    name, chosen = next(iter(answers.items()))
    if isinstance(chosen, list):
        return (prompt, answers) if len(chosen) == 1 else ([*prompt, *chosen[:-1]], {name: chosen[-1:]})
    turns = HUMAN in prompt and HUMAN in chosen and ASSISTANT in chosen
    return split_dialogues({name: prompt + chosen}) if turns else (prompt, answers)


def _decode_json_column(row: dict[str, Any], name: str, wanted: type) -> Any:
    """A list or an object, as such or as JSON."""
    value = row.get(name) or None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if value is not None and not isinstance(value, wanted):
        raise BrokenRow(f"expected {name!r} to be {describe_type(wanted())}, found {describe_type(value)}")
    return value


def _has_content(value: Any) -> bool:
    return value is not None and not (isinstance(value, str | list | dict) and not value)


def _suggest_columns(row: dict[str, Any], *wanted: str) -> str:
    """How to say which columns are the ones wanted, for the end of a message."""
    known = {"prompt", "chosen", "rejected", "completion", "response", "system", "tools", "subset"}
    others = [printable(k) for k, v in row.items() if k not in known and isinstance(v, str | list | dict) and v]
    wanted = [name for name in wanted if name not in row]
    if len(others) < len(wanted):
        wanted = wanted[len(wanted) - len(others) :]
    elif len(others) > len(wanted) > 1:
        others = [*others[: len(wanted) - 1], others[-1]]
    pairs = " ".join(f"{theirs}={ours}" for theirs, ours in zip(others, wanted, strict=False))
    return f"; --column says what is what, for example --column {pairs}" * bool(pairs)
