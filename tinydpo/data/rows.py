"""A row of preference data, in any of the usual forms, becomes a prompt and its answers.

docs/your-own-data.md has the table of forms. What cannot be read is a `BrokenRow`: "expected ..., found ...".
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from trl.data_utils import common_prefix_length, extract_prompt

from tinydpo.config.arguments import MESSAGE_KEYS

Message = dict[str, Any]

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
MESSAGE_COLUMNS = {"prompt", "chosen", "rejected", "completion", "response", "messages"}
OPENAI_COLUMNS = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
USUAL_NAMES = {
    "question": "prompt", "instruction": "prompt", "good": "chosen", "bad": "rejected", "output": "completion",
    "answer": "completion", "conversations": "messages",
}  # fmt: skip
# A conversation that was exported as a string begins with two keys of a message; JSON's quotes, or Python's.
MESSAGE_KEY = r"""["'](role|content|from|value)["']\s*:"""
EXPORTED = re.compile(rf"\s*\[?\s*\{{\s*{MESSAGE_KEY}.*{MESSAGE_KEY}", re.DOTALL)
REWARD_COLUMNS = ("reward_chosen", "reward_rejected")  # of on-policy pairs; training does not read them
MIN_REPEATED_WORDS = 4  # an answer that repeats fewer is not a copy of its prompt: "Thank you" may be the answer too


class BrokenRow(Exception):
    """What was expected of a row and what was found; whoever knows the file and row number adds them."""


@dataclass
class ParsedRow:
    """A row as it was read: texts or messages, before any chat template."""

    prompt: str | list[Message]
    answers: dict[str, Any]  # `chosen` and, for pairs, `rejected`, in the form of the prompt
    system: str | None = None  # of a text prompt ("" for an empty column); else it is among the messages
    tools: list | None = None
    template_options: dict[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`
    subset: str | None = None
    notes: list[str] = field(default_factory=list)  # what was ignored or changed

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ParsedRow":
        return cls(**json.loads(text))

    def to_columns(self) -> dict[str, Any]:
        """The row under the usual column names, as in a file of rows."""
        beside = {"system": self.system, "tools": self.tools, "subset": self.subset}
        row = {"prompt": self.prompt, **self.answers, **beside, "chat_template_kwargs": self.template_options}
        return {name: value for name, value in row.items() if value is not None}


def decode_row(record: bytes) -> dict[str, Any]:
    """Decode one JSON object (BrokenRow: it is something else)."""
    try:
        row = json.loads(record)
    except ValueError as error:
        preview = record[:30].decode(errors="replace").strip()
        raise BrokenRow(f"expected one JSON object, found {preview!r} ({error})") from None
    if not isinstance(row, dict):
        raise BrokenRow(f"expected a JSON object with keys, found {describe_type(row)}")
    return row


def read_row(
    row: dict[str, Any], columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> ParsedRow:
    """Read a row in any of the known forms (BrokenRow: it has none of them).

    `columns` says what columns and message keys of the data are called here (`--column`), `roles` likewise (`--role`).
    """
    row = _rename(_unwrap_openai_row(row), columns or {}, roles or {})
    answers = _find_answers(row)
    system = row["system"] or "" if "system" in row else None
    if not isinstance(system, str | None):
        raise BrokenRow(f"expected 'system' to be a string, found {describe_type(system)}")

    prompt_column = "prompt"
    notes = []
    if all(isinstance(answer, list) for answer in answers.values()):
        if row.get("prompt") is None and "messages" not in answers:
            prompt_column = "messages"  # axolotl's form
        prompt, answers = _parse_conversation(prompt_column, row.get(prompt_column), answers, notes)
        if system and prompt[0] != {"role": "system", "content": system}:
            prompt = [{"role": "system", "content": system}, *prompt]
        system = None
    else:
        prompt, answers = _parse_texts(row, answers, notes)
        is_long = is_hh_prompt(prompt) or len(prompt.split()) >= MIN_REPEATED_WORDS
        if "prompt" in row and is_long and all(text.startswith(prompt) for text in answers.values()):
            answers = {name: text[len(prompt) :] for name, text in answers.items()}
            notes.append("answers repeat the prompt, which is taken once")

    subset = row.get("subset")
    options = _decode_json_column(row, "chat_template_kwargs", dict) or {}
    known = {prompt_column, "prompt", *answers, "system", "tools", "chat_template_kwargs", "subset", *REWARD_COLUMNS}
    unread = [name for name, value in row.items() if name not in known and value not in (None, "", [], {})]
    parsed = ParsedRow(
        prompt=prompt,
        answers=dict(zip(("chosen", "rejected"), answers.values(), strict=False)),
        system=system,
        tools=_decode_json_column(row, "tools", list),
        template_options={name: value for name, value in options.items() if value is not None},
        subset=subset if isinstance(subset, str | None) else json.dumps(subset),
        notes=notes + [f"column {name!r} is not read" for name in unread],
    )
    try:
        parsed.to_json().encode()
    except UnicodeEncodeError:
        raise BrokenRow("expected valid text, found half of a character (a lone surrogate)") from None
    return parsed


def keep_last_turn(row: ParsedRow) -> ParsedRow:
    """Keep only the last turn of the chosen answer, for SFT: what comes before it is not to be learned."""
    chosen = row.answers["chosen"]
    if isinstance(chosen, list) and len(chosen) > 1:
        return replace(row, prompt=[*row.prompt, *chosen[:-1]], answers={"chosen": chosen[-1:]})
    if isinstance(chosen, str) and is_hh_prompt(row.prompt) and HUMAN in chosen:
        prompt, answers = split_dialogues({"chosen": row.prompt + chosen})
        return replace(row, prompt=prompt, answers=answers)
    return row


def is_hh_prompt(prompt: str) -> bool:
    """Whether a text has a human turn in HH's form; the file may have lost the line breaks before the first one."""
    return HUMAN in f"\n\n{prompt}"


def split_dialogues(dialogues: dict[str, str]) -> tuple[str, dict[str, str]]:
    """Split whole HH dialogues at the last assistant turn that starts the same in all of them.

    The dialogues of a pair may part before their last turn; cutting rejected at chosen's prompt would garble it.
    """
    for name, dialogue in dialogues.items():
        if dialogue.rfind(HUMAN) > dialogue.rfind(ASSISTANT):
            raise BrokenRow(f"expected {name!r} to end in an assistant turn, found a human turn")
    shared = common_prefix(dialogues.values())
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise BrokenRow(f"expected dialogues that share a prompt up to {ASSISTANT!r}, found no shared assistant turn")
    end = start + len(ASSISTANT)
    return shared[:end], {name: dialogue[end:] for name, dialogue in dialogues.items()}


def common_prefix(texts: Iterable[str]) -> str:
    """The longest text that all of `texts` start with."""
    texts = sorted(texts)
    return texts[0][: common_prefix_length(texts[0], texts[-1])]


def describe_type(value: Any) -> str:
    """A value as a message names it."""
    return {type(None): "null", str: "a string", dict: "an object", list: "a list"}.get(type(value), repr(value)[:40])


def _unwrap_openai_row(row: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's preference form under the usual names; any other row as it is."""
    given = row.get("input")
    if not (isinstance(given, dict) and "messages" in given and OPENAI_COLUMNS.keys() & row):
        return row
    beside = {OPENAI_COLUMNS.get(key, key): value for key, value in row.items() if key != "input"}
    return {"prompt": given["messages"], "tools": given.get("tools"), **beside}


def _rename(row: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, str]) -> dict[str, Any]:
    """The row with the names that are used here, in its messages too, which may have been exported as strings."""
    message_keys = {theirs: ours for theirs, ours in columns.items() if ours in MESSAGE_KEYS}
    row = _rename_keys(row, {theirs: ours for theirs, ours in columns.items() if ours not in MESSAGE_KEYS})

    def rename_message(message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        message = _rename_keys(message, message_keys)
        if isinstance(message.get("role"), str):
            message["role"] = roles.get(message["role"], message["role"])
        return message

    for name in MESSAGE_COLUMNS & row.keys():
        value = row[name]
        if isinstance(value, str) and EXPORTED.match(value):
            try:
                value = json.loads(value)
            except ValueError:
                raise BrokenRow(
                    f"expected the messages of {name!r} as a list or as JSON, found {value[:40]!r}"
                ) from None
        if isinstance(value, dict):  # one message on its own
            value = [value]
        if isinstance(value, list):
            row[name] = [rename_message(message) for message in value]
    return row


def _rename_keys(mapping: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in mapping.items():
        name = names.get(key, key)
        if renamed.get(name) is not None and value is not None:
            raise BrokenRow(f"two columns map to {name!r}, one of them {key!r}")
        if value is not None or name not in renamed:
            renamed[name] = value
    return renamed


def _find_answers(row: dict[str, Any]) -> dict[str, Any]:
    """The answers by their columns, the chosen one first."""
    if "chosen" in row and "rejected" in row:
        return {"chosen": row["chosen"], "rejected": row["rejected"]}
    for name in ("completion", "response", "messages"):
        if row.get(name) is not None and ("prompt" in row or name == "messages"):
            return {name: row[name]}
    for given, missing in (("chosen", "rejected"), ("rejected", "chosen")):
        if given in row:
            raise BrokenRow(f"found the key {given!r} without {missing!r}")
    found = ", ".join(map(repr, list(row)[:6])) or "no keys"
    renames = [f"{name}={USUAL_NAMES[name]}" for name in row if name in USUAL_NAMES] or ["question=prompt"]
    raise BrokenRow(
        "expected the keys 'chosen' and 'rejected' (for SFT also 'prompt' and 'completion', or 'messages'), "
        f"found {found}; --column names other columns, for example --column {' '.join(renames)}"
    )


def _parse_conversation(
    column: str, prompt: Any, answers: dict[str, list], notes: list[str]
) -> tuple[list[Message], dict[str, list[Message]]]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | None):
        raise BrokenRow(f"expected 'prompt' to be a string or a list of messages, found {describe_type(prompt)}")
    prompt = [_normalize_message("prompt", message) for message in prompt or []]
    answers = {name: [_normalize_message(name, message) for message in answers[name]] for name in answers}
    if not prompt or any(not messages or messages[0]["role"] != "assistant" for messages in answers.values()):
        # The answers are whole conversations: a `prompt` column repeats how they begin, or holds a system message.
        shared, answers = _split_conversations(answers)
        system = []
        if shared[0]["role"] != "system":
            system = [message for message in prompt if message["role"] == "system"]
        if all(message in system or message in shared for message in prompt):
            prompt = [*system, *shared]
        else:
            name = next(iter(answers))
            notes.append(f"column {column!r} is not read: {name!r} is a whole conversation that begins otherwise")
            prompt = shared
    for name, messages in answers.items():
        role = messages[-1]["role"]
        if role != "assistant":
            raise BrokenRow(f"expected {name!r} to end in an assistant message, found one by {role!r}")
    return prompt, answers


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
    roles = ", ".join(dict.fromkeys(repr(message["role"]) for message in first))
    raise BrokenRow(
        f"expected conversations that share a prompt before an assistant message, found none (roles: {roles}); "
        "--role names other roles, for example --role human=user gpt=assistant"
    )


def _normalize_message(column: str, message: Any) -> Message:
    """A message with text as its content, or null where it only calls tools."""
    expected = f"expected {column!r} to hold messages with the strings 'role' and 'content'"
    if not isinstance(message, dict):
        raise BrokenRow(f"{expected}, found {describe_type(message)}")
    message = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise BrokenRow(f"expected the content of messages in {column!r} to be text, found {repr(content)[:60]}")
        content = "".join(part["text"] for part in content)
        message["content"] = content
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_decode_tool_call(call) for call in message["tool_calls"]]
    calls_tools = content is None and message.get("tool_calls")
    if isinstance(message.get("role"), str) and (isinstance(content, str) or calls_tools):
        return message
    found = ", ".join(f"{key!r}: {describe_type(value)}" for key, value in message.items())
    raise BrokenRow(
        f"{expected}, found {found or 'no keys'}; --column names other keys, for example --column "
        "conversations=messages from=role value=content"
    )


def _decode_tool_call(call: Any) -> Any:
    """A tool call with its arguments, a JSON string in OpenAI's form, as the mapping that chat templates expect."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (KeyError, TypeError, ValueError):
        return call  # it has been decoded already, or has an unknown form
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _parse_texts(row: dict[str, Any], answers: dict[str, Any], notes: list[str]) -> tuple[str, dict[str, str]]:
    texts = {"prompt": row["prompt"], **answers} if "prompt" in row else answers
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BrokenRow(f"expected {name!r} to be a string, found {describe_type(text)}")
    if "prompt" in row:
        return row["prompt"], answers
    has_turns = any(HUMAN in text or ASSISTANT in text for text in answers.values())
    if has_turns or len(answers) == 1 or not common_prefix(answers.values()):
        return split_dialogues(answers)
    notes.append("there is no prompt: what both texts begin with is taken for it, as TRL does")
    parts = extract_prompt(answers)
    return parts.pop("prompt"), parts


def _decode_json_column(row: dict[str, Any], name: str, kind: type) -> Any:
    """A list or an object, given as such or as a JSON string; None if it is empty."""
    value = row.get(name)
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if value and not isinstance(value, kind):
        raise BrokenRow(f"expected {name!r} to be {describe_type(kind())}, found {describe_type(value)}")
    return value or None
