"""One record, the JSON bytes of a row: decoded, and under the names used here. What is wrong is a `BrokenRow`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinydpo.config.arguments import MESSAGE_KEYS, DataArguments, parse_renames

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "response", "messages")
OPENAI_COLUMNS = {"preferred_output": "chosen", "non_preferred_output": "rejected"}


class BrokenRow(Exception):
    """What was expected of a row, without its file and number."""


def decode_row(record: bytes) -> dict[str, Any]:
    """A row of a JSON-lines file, or what is wrong with it (`BrokenRow`)."""
    try:
        row = parse_json(record)
    except UnicodeDecodeError:
        raise BrokenRow("expected UTF-8 text, found other bytes") from None
    except (ValueError, RecursionError) as error:
        raise BrokenRow(f"expected one JSON object, found {_preview(record)} ({error})") from None
    if not isinstance(row, dict):
        raise BrokenRow(f"expected a JSON object with keys, found {describe_type(row)}")
    return row


def parse_json(text: bytes) -> Any:
    """Parse JSON in UTF-8, with a byte-order mark or without.

    Raises:
        UnicodeDecodeError: if it is not UTF-8 (`json` would also take a row in UTF-16, which lines do not survive).
        ValueError: if it is not JSON, or an object has a key twice (Python would take the last, others the first).
        RecursionError: if it is nested without end.
    """
    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_reject_duplicate_keys)


@dataclass(frozen=True)
class ColumnNames:
    """What the data call their columns, keys of messages and roles, each with the name that it has here."""

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataArguments) -> "ColumnNames":
        """What `--column` and `--role` say."""
        return cls(parse_renames(data.column), parse_renames(data.role))


NO_RENAMES = ColumnNames()


def rename_columns(row: dict[str, Any], names: ColumnNames) -> dict[str, Any]:
    """The row with the data's names exchanged for those read here, in its messages too.

    Raises:
        BrokenRow: two columns claim one name.
    """
    row = unwrap_openai_row(row)
    if not (names.columns or names.roles):
        return row
    row = _rename_keys(row, {theirs: ours for theirs, ours in names.columns.items() if ours not in MESSAGE_KEYS})
    inside = {theirs: ours for theirs, ours in names.columns.items() if ours in MESSAGE_KEYS}

    def message(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = _rename_keys(value, inside)
        role = value.get("role")
        return {**value, "role": names.roles.get(role, role)} if isinstance(role, str) else value

    for key in MESSAGE_COLUMNS:
        if isinstance(row.get(key), list):
            row[key] = [message(value) for value in row[key]]
        elif isinstance(row.get(key), dict):
            row[key] = message(row[key])
    return row


def unwrap_openai_row(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's preference form under the usual names; another row as it is."""
    asked = row.get("input")
    if not (isinstance(asked, dict) and "messages" in asked and OPENAI_COLUMNS.keys() & row):
        return row
    rest = {f"input.{key}": value for key, value in asked.items() if key not in ("messages", "tools")}
    kept = {OPENAI_COLUMNS.get(key, key): value for key, value in row.items() if key != "input"}
    return {"prompt": asked["messages"], "tools": asked.get("tools"), **rest, **kept}


def describe_type(value: Any) -> str:
    """A value as a message names it."""
    return {type(None): "null", str: "a string", dict: "an object", list: "a list"}.get(type(value), repr(value)[:40])


def printable(name: str) -> str:
    """A name out of the data as a message can hold it."""
    return repr(name)[1:-1][:40]


def _rename_keys(mapping: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in mapping.items():
        name = names.get(key, key)
        if renamed.get(name) is not None and value is not None:
            raise BrokenRow(f"expected one column for {name!r}, found two, {printable(key)!r} and another one")
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def _preview(record: bytes) -> str:
    """How a record starts, to tell an HTML page from a table from a cut row."""
    text = record[:80].decode("utf-8-sig", errors="replace").strip()
    return repr(text[:30]) + "…" * (len(text) > 30)


Message = dict[str, Any]


def normalize_messages(name: str, messages: list) -> list[Message]:
    """The messages under a key: each with text for its content, or null where it only calls tools.

    Raises:
        BrokenRow: they are none, or hold something else than text.
    """
    if not messages:
        raise BrokenRow(f"expected {name!r} to hold at least one message, found an empty list")
    return [_normalize_message(name, message) for message in messages]


def split_conversations(answers: dict[str, list[Message]]) -> tuple[list[Message], dict[str, list[Message]]]:
    """Split whole conversations before the last assistant message that follows the same messages in all of them.

    Raises:
        BrokenRow: there is none.
    """
    first, *others = answers.values()
    for start in range(min(map(len, answers.values())) - 1, 0, -1):
        shared = all(messages[:start] == first[:start] for messages in others)
        if shared and all(messages[start]["role"] == "assistant" for messages in answers.values()):
            return first[:start], {name: messages[start:] for name, messages in answers.items()}
    told = "expected conversations that share a prompt before an assistant message"
    roles = {message["role"]: None for message in first if message["role"] != "user"}
    if roles and "assistant" not in roles:
        role = printable(list(roles)[-1])
        told += f"; found the role {role!r}, and --role {role}=assistant says that it is one"
    raise BrokenRow(told)


def prepend_system(system: str | None, prompt: list[Message]) -> list[Message]:
    """A prompt after the system message that stood beside it, if any."""
    if not system:
        return prompt
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise BrokenRow("expected one system message, found 'system' and another one in the conversation")
    return prompt


def _normalize_message(name: str, message: Any) -> Message:
    told = f"expected {name!r} to hold messages with the strings 'role' and 'content'"
    if not isinstance(message, dict):
        raise BrokenRow(f"{told}, found {describe_type(message)}")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        message = {**message, "content": (content := "".join(_read_text_part(name, part) for part in content))}
    if calls and isinstance(calls, list):
        message = {**message, "tool_calls": [_decode_tool_call(call) for call in calls]}
    if isinstance(message.get("role"), str) and (isinstance(content, str) or (content is None and calls)):
        return message
    texts = [key for key, value in message.items() if isinstance(value, str) and key not in MESSAGE_KEYS]
    theirs = sorted(texts, key=lambda key: len(message[key]))  # the name of a role is short
    pairs = zip(theirs, [key for key in MESSAGE_KEYS if key not in message], strict=False)
    example = " ".join(f"{printable(one)}={ours}" for one, ours in pairs)
    raise BrokenRow(told + f"; --column says what is what, for example --column {example}" * bool(example))


def _read_text_part(name: str, part: Any) -> str:
    found = part.get("type") if isinstance(part, dict) else part
    if found != "text" or not isinstance(part.get("text"), str):
        raise BrokenRow(f"expected the content of messages in {name!r} to be text, found a part {repr(found)[:40]}")
    return part["text"]


def _decode_tool_call(call: Any) -> Any:
    """A tool call whose arguments, JSON as OpenAI sends them, are the mapping that templates write as JSON again."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return call
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
MIN_REPEATED_WORDS = (
    4  # words from which a prompt that opens its answers is taken for a copy: "Thank you" may well be answered so
)
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
    form.options = {
        k: v for k, v in (_decode_json_column(row, "chat_template_kwargs", dict) or {}).items() if v is not None
    }
    read_too = {"prompt", asked, *answers, "system", "tools", "chat_template_kwargs", "subset", *REWARD_COLUMNS}
    form.notes += [
        unread_column_note(key) for key, value in row.items() if key not in read_too and _has_content(value)
    ]
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
            raise BrokenRow(
                "expected 'completion' or 'response' beside 'prompt'" + _suggest_columns(row, "completion")
            )
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
            raise BrokenRow(
                f"expected {name!r} to end in an assistant message, found one by {printable(role)!r} there"
            )
    return ParsedRow(prepend_system(system, prompt), answers)


def _parse_texts(
    row: dict[str, Any], answers: dict[str, Any], system: str | None, need_pairs: bool | None
) -> ParsedRow:
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
