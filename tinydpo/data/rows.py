"""A row of preference data, in any of the usual forms, becomes a prompt and its answers.

docs/your-own-data.md has the table of forms. What cannot be read is a `BrokenRow`: "expected ..., found ...".
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trl.data_utils import common_prefix_length

from tinydpo.config.arguments import MESSAGE_KEYS

Message = dict[str, Any]

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "response", "messages")
OPENAI_COLUMNS = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
REWARD_COLUMNS = ("reward_chosen", "reward_rejected")  # of on-policy pairs; training does not read them
MIN_REPEATED_WORDS = 4  # an answer that repeats fewer words of its prompt is no copy: "Thank you" may be answered so
COLUMN_HINT = "; --column names other columns, for example --column question=prompt"
MESSAGE_HINT = "; --column names other keys, for example --column conversations=messages from=role value=content"
REPEATED_PROMPT_NOTE = "answers repeat the prompt, which is taken once"


class BrokenRow(Exception):
    """What was expected of a row and what was found; whoever knows the file and row number adds them."""


@dataclass
class ParsedRow:
    """A row as it was read: texts or messages, before any chat template."""

    prompt: str | list[Message]
    answers: dict[str, Any]  # `chosen` and, for pairs, `rejected`, in the form of the prompt
    system: str | None = None  # beside a text prompt ("" for an empty column); else it is among the messages
    tools: list | None = None
    template_options: dict[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`
    subset: str | None = None
    notes: list[str] = field(default_factory=list)  # what was ignored or changed

    def to_json(self) -> str:
        """The row as JSON."""
        return json.dumps(vars(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ParsedRow":
        """The row that `to_json` wrote."""
        return cls(**json.loads(text))

    def to_columns(self) -> dict[str, Any]:
        """The row under the usual column names, as a file of rows holds it."""
        beside = {"system": self.system, "tools": self.tools, "subset": self.subset}
        row = {"prompt": self.prompt, **self.answers, **beside, "chat_template_kwargs": self.template_options}
        return {name: value for name, value in row.items() if value is not None}


def decode_row(record: bytes) -> dict[str, Any]:
    """Decode one JSON object (BrokenRow: it is something else)."""
    try:
        row = json.loads(record)
    except (ValueError, RecursionError) as error:
        preview = record[:80].decode("utf-8-sig", errors="replace").strip()
        raise BrokenRow(f"expected one JSON object, found {preview[:30]!r} ({error})") from None
    if not isinstance(row, dict):
        raise BrokenRow(f"expected a JSON object with keys, found {describe_type(row)}")
    return row


def read_row(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> ParsedRow:
    """Read a row in any of the known forms.

    Args:
        row: one JSON object.
        columns: what columns and message keys of the data are called here (`--column`).
        roles: what roles of the data are called here (`--role`).

    Raises:
        BrokenRow: if the row has none of the known forms.
    """
    row = _rename(_unwrap_openai_row(row), columns or {}, roles or {})
    answers = _find_answers(row)
    system = row["system"] or "" if "system" in row else None
    if not isinstance(system, str | None):
        raise BrokenRow(f"expected 'system' to be a string, found {describe_type(system)}")

    prompt_column = "prompt"
    notes = []
    if all(isinstance(answer, list) for answer in answers.values()):
        if row.get("prompt") is None and "messages" not in answers and all(map(_is_reply, answers.values())):
            prompt_column = "messages"  # axolotl's form
        prompt, by_column = _parse_conversation(row.get(prompt_column), answers)
        prompt = _prepend_system(system, prompt)
        system = None
    else:
        prompt, by_column = _parse_texts(row, answers)
        if "prompt" in row and _repeats_prompt(prompt, by_column.values()):
            by_column = {name: text[len(prompt) :] for name, text in by_column.items()}
            notes.append(REPEATED_PROMPT_NOTE)

    options = _decode_json_column(row, "chat_template_kwargs", dict) or {}
    known = {prompt_column, "prompt", *answers, "system", "tools", "chat_template_kwargs", "subset", *REWARD_COLUMNS}
    unread = [name for name, value in row.items() if name not in known and value not in (None, "", [], {})]
    parsed = ParsedRow(
        prompt=prompt,
        answers=dict(zip(("chosen", "rejected"), by_column.values(), strict=False)),
        system=system,
        tools=_decode_json_column(row, "tools", list),
        template_options={name: value for name, value in options.items() if value is not None},
        subset=row["subset"] if isinstance(row.get("subset"), str) else None,
        notes=notes + [unread_column_note(name) for name in unread],
    )
    try:
        parsed.to_json().encode()
    except UnicodeEncodeError:
        raise BrokenRow("expected valid text, found half of a character (a lone surrogate)") from None
    return parsed


def keep_last_turn(row: ParsedRow) -> ParsedRow:
    """Keep only the last turn of the chosen answer, for SFT: what comes before it is not to be learned.

    Raises:
        BrokenRow: if an answer ends in a human turn.
    """
    chosen = row.answers["chosen"]
    if isinstance(chosen, list):
        if len(chosen) == 1:
            return row
        return replace(row, prompt=[*row.prompt, *chosen[:-1]], answers={"chosen": chosen[-1:]})
    if HUMAN not in row.prompt:
        return row
    _check_last_turns(row.answers)
    if not (HUMAN in chosen and ASSISTANT in chosen):
        return row
    prompt, answers = split_dialogues({"chosen": row.prompt + chosen})
    return replace(row, prompt=prompt, answers=answers)


def split_dialogues(dialogues: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Split whole HH dialogues at the last assistant turn that starts the same in all of them.

    The dialogues of a pair may part before their last turn; cutting rejected at chosen's prompt would garble it.
    """
    shared = common_prefix(dialogues.values())
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise BrokenRow(
            f"expected dialogues that share a prompt up to {ASSISTANT!r}, found no shared assistant turn and no "
            f"'prompt'{COLUMN_HINT}"
        )
    end = start + len(ASSISTANT)
    return shared[:end], {name: dialogue[end:] for name, dialogue in dialogues.items()}


def common_prefix(texts: Iterable[str]) -> str:
    """The longest text that all of `texts` start with."""
    texts = sorted(texts)
    return texts[0][: common_prefix_length(texts[0], texts[-1])]


def describe_type(value: Any) -> str:
    """A value as a message names it."""
    return {type(None): "null", str: "a string", dict: "an object", list: "a list"}.get(type(value), repr(value)[:40])


def printable(name: str) -> str:
    """A name from the data, short and escaped, for a message."""
    return repr(name)[1:-1][:40]


def unread_column_note(name: str) -> str:
    """The note on a column that is ignored."""
    return f"column {printable(name)!r} is not read"


def _unwrap_openai_row(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's preference form under the usual names; any other row as it is."""
    given = row.get("input")
    if not (isinstance(given, dict) and "messages" in given and OPENAI_COLUMNS.keys() & row):
        return row
    rest = {f"input.{key}": value for key, value in given.items() if key not in ("messages", "tools")}
    beside = {OPENAI_COLUMNS.get(key, key): value for key, value in row.items() if key != "input"}
    return {"prompt": given["messages"], "tools": given.get("tools"), **rest, **beside}


def _rename(row: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, str]) -> dict[str, Any]:
    """The row with the names that are used here, in its messages too."""
    if not columns and not roles:
        return row
    message_keys = {theirs: ours for theirs, ours in columns.items() if ours in MESSAGE_KEYS}
    row = _rename_keys(row, {theirs: ours for theirs, ours in columns.items() if ours not in MESSAGE_KEYS})

    def rename_message(message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        message = _rename_keys(message, message_keys)
        if isinstance(message.get("role"), str):
            message["role"] = roles.get(message["role"], message["role"])
        return message

    for name in MESSAGE_COLUMNS:
        if isinstance(row.get(name), list):
            row[name] = [rename_message(message) for message in row[name]]
        elif isinstance(row.get(name), dict):
            row[name] = rename_message(row[name])
    return row


def _rename_keys(mapping: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in mapping.items():
        name = names.get(key, key)
        if renamed.get(name) is not None and value is not None:
            raise BrokenRow(f"expected one column for {name!r}, found two, {printable(key)!r} and another one")
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed


def _find_answers(row: dict[str, Any]) -> dict[str, Any]:
    """The answers by their columns, the chosen one first; a message on its own becomes a list of one."""
    if "chosen" in row and "rejected" in row:
        beside_messages = isinstance(row.get("messages"), list) or isinstance(row.get("prompt"), list)
        answers = {}
        for name in ("chosen", "rejected"):
            answer = row[name]
            is_message = isinstance(answer, dict) and (beside_messages or "role" in answer)
            answers[name] = [answer] if is_message else answer
        return answers
    if not ("chosen" in row or "rejected" in row):
        if row.get("messages") is not None and row.get("completion") is None and row.get("response") is None:
            if isinstance(row["messages"], list):
                return {"messages": row["messages"]}
            raise BrokenRow(f"expected 'messages' to be a list of messages, found {describe_type(row['messages'])}")
        for name in ("completion", "response"):
            if "prompt" in row and name in row:
                return {name: row[name]}
    found = ", ".join(map(repr, list(row)[:6])) or "no keys"
    raise BrokenRow(
        "expected the keys 'chosen' and 'rejected' (for SFT also 'prompt' and 'completion', or 'messages'), "
        f"found {found}{COLUMN_HINT}"
    )


def _parse_conversation(prompt: Any, answers: dict[str, list]) -> tuple[list[Message], dict[str, list[Message]]]:
    answers = {name: _normalize_messages(name, messages) for name, messages in answers.items()}
    if isinstance(prompt, list):
        prompt = _normalize_messages("prompt", prompt) if prompt else None
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        raise BrokenRow(f"expected 'prompt' to be a string or a list of messages, found {describe_type(prompt)}")
    if not prompt or not all(map(_is_reply, answers.values())):
        # The answers are whole conversations; a prompt beside them only repeats how they begin.
        prompt, answers = _split_conversations(answers)
    for name, messages in answers.items():
        role = messages[-1]["role"]
        if role != "assistant":
            raise BrokenRow(f"expected {name!r} to end in an assistant message, found one by {printable(role)!r}")
    return prompt, answers


def _is_reply(answer: list) -> bool:
    """Whether an answer is messages that continue a prompt, and not a whole conversation."""
    return bool(answer) and isinstance(answer[0], dict) and answer[0].get("role") == "assistant"


def _split_conversations(answers: dict[str, list[Message]]) -> tuple[list[Message], dict[str, list[Message]]]:
    """Split whole conversations before the last assistant message that follows the same messages in all of them."""
    first = next(iter(answers.values()))
    shortest = min(map(len, answers.values()))
    for start in range(shortest - 1, 0, -1):
        if all(
            messages[:start] == first[:start] and messages[start]["role"] == "assistant"
            for messages in answers.values()
        ):
            return first[:start], {name: messages[start:] for name, messages in answers.items()}
    roles = ", ".join(dict.fromkeys(printable(message["role"]) for message in first))
    raise BrokenRow(
        f"expected conversations that share a prompt before an assistant message, found none (roles: {roles}); "
        "--role names other roles, for example --role human=user gpt=assistant"
    )


def _prepend_system(system: str | None, prompt: list[Message]) -> list[Message]:
    """The prompt after the system message that stood beside it, if any."""
    if not system:
        return prompt
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise BrokenRow("expected one system message, found 'system' and another one in the conversation")
    return prompt


def _normalize_messages(column: str, messages: list) -> list[Message]:
    """The messages of a column, each with text as its content, or null where it only calls tools."""
    if not messages:
        raise BrokenRow(f"expected {column!r} to hold at least one message, found an empty list")
    return [_normalize_message(column, message) for message in messages]


def _normalize_message(column: str, message: Any) -> Message:
    expected = f"expected {column!r} to hold messages with the strings 'role' and 'content'"
    if not isinstance(message, dict):
        raise BrokenRow(f"{expected}, found {describe_type(message)}")
    message = dict(message)
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_read_text_part(column, part) for part in message["content"])
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_decode_tool_call(call) for call in message["tool_calls"]]
    content = message.get("content")
    calls_tools = content is None and message.get("tool_calls")
    if isinstance(message.get("role"), str) and (isinstance(content, str) or calls_tools):
        return message
    found = ", ".join(f"{key!r}: {describe_type(value)}" for key, value in message.items())
    raise BrokenRow(f"{expected}, found {found or 'no keys'}{MESSAGE_HINT}")


def _read_text_part(column: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BrokenRow(f"expected the content of messages in {column!r} to be text, found a part {repr(kind)[:40]}")
    return part["text"]


def _decode_tool_call(call: Any) -> Any:
    """A tool call with its arguments, a JSON string in OpenAI's form, as the mapping that chat templates expect."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return call  # it is in another form already
    return {**call, "function": {**call["function"], "arguments": arguments}} if isinstance(arguments, dict) else call


def _parse_texts(row: dict[str, Any], answers: dict[str, Any]) -> tuple[str, dict[str, str]]:
    texts = {"prompt": row["prompt"], **answers} if "prompt" in row else answers
    for name, text in texts.items():
        if not isinstance(text, str):
            hint = MESSAGE_HINT if isinstance(text, dict) else ""
            raise BrokenRow(f"expected {name!r} to be a string, found {describe_type(text)}{hint}")
    if "prompt" in row:
        return row["prompt"], answers
    prompt, answers = split_dialogues(answers)
    _check_last_turns(answers)
    return prompt, answers


def _repeats_prompt(prompt: str, answers: Iterable[str]) -> bool:
    """Whether the answers are whole texts, prompt included, and do not just happen to begin like it."""
    if not prompt.strip() or not all(answer.startswith(prompt) for answer in answers):
        return False
    if HUMAN in prompt:
        return True
    rests = [answer[len(prompt) :] for answer in answers]
    ends_at_a_word = prompt[-1].isspace() or all(not rest or rest[0].isspace() for rest in rests)
    return ends_at_a_word and len(prompt.split()) >= MIN_REPEATED_WORDS


def _check_last_turns(answers: dict[str, str]) -> None:
    for name, text in answers.items():
        if text.rfind(HUMAN) > text.rfind(ASSISTANT):
            raise BrokenRow(f"expected {name!r} to end in an assistant turn, found a human turn")


def _decode_json_column(row: dict[str, Any], name: str, kind: type) -> Any:
    """A list or an object, given as such or as a JSON string; None if it is empty."""
    value = row.get(name) or None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass
    if value is not None and not isinstance(value, kind):
        raise BrokenRow(f"expected {name!r} to be {describe_type(kind())}, found {describe_type(value)}")
    return value or None
