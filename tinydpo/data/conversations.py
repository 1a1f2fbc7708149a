"""Conversations: lists of messages, checked, and split into what was asked and what was answered."""

import json
from typing import Any

from tinydpo.data.records import BrokenRow, describe_type, printable
from tinydpo.launching.arguments import MESSAGE_KEYS

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
