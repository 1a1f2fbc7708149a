"""What a prompt is to whoever is asked: messages to what has a chat template, a dialogue to people and judges.

The policy's own template is for the policy alone (`dialogues` writes it); others never see its markers.
"""

import json
import re
from typing import Any

from datasets import Dataset

from tinydpo.data.conversations import Message
from tinydpo.data.dialogues import ASSISTANT, HUMAN, special_token_pattern

Prompt = str | list[Message]
NAMES = {"user": HUMAN, "assistant": ASSISTANT}
TURN = re.compile("|".join(map(re.escape, NAMES.values())))


def get_prompts(texts: Dataset) -> list[Prompt]:
    """The prompts of rows with the columns of `dialogues.TEXTS`: a conversation's messages, else the text as it is."""
    columns = (texts[name][:] for name in ("prompt", "messages"))
    return [json.loads(messages) if messages else text for text, messages in zip(*columns, strict=True)]


def get_readable_columns(texts: Dataset, tokenizer: Any, *completions: str) -> dict[str, list[str]]:
    """`prompt` and `completions` (by default `chosen`) of such rows as people read them, without the markers of a chat
    template."""
    markers = special_token_pattern(tokenizer)
    read = {"prompt": [*map(format_prompt, get_prompts(texts))]}
    for name in completions or ("chosen",):
        columns = (texts[name][:], texts["templated"][:])
        read[name] = [markers.sub("", text) if made else text for text, made in zip(*columns, strict=True)]
    return read


def format_dialogue(messages: list[Message]) -> str:
    """A conversation as people read it: HH's form, and other roles by their names."""
    turns = []
    for message in messages:
        words = message.get("content") or json.dumps(message.get("tool_calls") or "", ensure_ascii=False).strip('"')
        name = NAMES.get(message["role"], f"\n\n{message['role'].capitalize()}:")
        turns.append(f"{name} {words}" if words else name)
    return "".join(turns)


def format_prompt(prompt: Prompt) -> str:
    """A prompt up to where the answer begins, as people and judges read it."""
    return prompt if isinstance(prompt, str) else format_dialogue(prompt) + ASSISTANT


def typed_to_dialogue(typed: str) -> str:
    """A question in plain text as HH writes dialogues; a text in that form already only gets what it lacks."""
    text = f"\n\n{_clean_typed(typed)}"
    text = text if HUMAN in text else f"{HUMAN} {text[2:]}"
    return text if text.endswith(ASSISTANT) else text + ASSISTANT


def typed_to_messages(typed: str) -> list[Message]:
    """A question in plain text, or a dialogue in HH's form, as messages; what stands before its first turn is the
    system's."""
    text = f"\n\n{_clean_typed(typed)}"
    if HUMAN not in text:
        return [{"role": "user", "content": text[2:]}]
    roles = ["system", *({name: role for role, name in NAMES.items()}[turn] for turn in TURN.findall(text))]
    turns = [{"role": role, "content": words.strip()} for role, words in zip(roles, TURN.split(text), strict=True)]
    if turns[-1] == {"role": "assistant", "content": ""}:  # where the answer begins
        turns.pop()
    return turns if turns[0]["content"] else turns[1:]


def _clean_typed(typed: str) -> str:
    return typed.strip().encode(errors="replace").decode()  # half of a character cannot be written to a file
