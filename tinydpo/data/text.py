"""A parsed row becomes one text pair: prompt, chosen, rejected, and where the last human turn starts.

Texts stay as they are. A conversation takes the model's chat template, or HH's `Human:`/`Assistant:` form if the model
has none. The second half has the way back: prompts as people read and type them.
"""

import json
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from tinydpo.data import CACHE_VERSION
from tinydpo.data.rows import (
    ASSISTANT,
    HUMAN,
    BrokenRow,
    Message,
    ParsedRow,
    common_prefix,
    keep_last_turn,
    printable,
    unread_column_note,
)
from tinydpo.errors import UserError
from tinydpo.models.stop_tokens import find_turn_end, strip_turn_end

Prompt = str | list[Message]

TURNS = {"system": "\n\n", "user": HUMAN, "assistant": ASSISTANT}
TURN_NAMES = {HUMAN: "user", ASSISTANT: "assistant"}
TEXT_FEATURES = Features(
    {
        "prompt": Value("string"),
        "question": Value("int64"),  # where in the prompt the last human turn starts, in characters
        "chosen": Value("string"),
        "rejected": Value("string"),  # null for SFT rows without one
        "messages": Value("string"),  # the prompt of a conversation as JSON, null for texts
        "templated": Value("bool"),  # written by a chat template: special tokens in the text are meant as such
        "subset": Value("string"),
        "notes": List(Value("string")),  # what of the row was ignored or changed
        "broken": Value("string"),  # why a skipped row could not be read, else null
    }
)
SPACE_MOVED_NOTE = "a space at the prompt's end goes to the answers, where tokens have it"


def render_texts(rows: Dataset, tokenizer: Any, need_pairs: bool | None, on_bad_row: str, workers: int) -> Dataset:
    """Render parsed rows (columns of `splits.ROW_FEATURES`) as text pairs (`TEXT_FEATURES`), in the same order.

    With `on_bad_row="stop"` the first broken row is a UserError that names its file and number; with `"skip"` it
    becomes an empty row with the reason in `broken`. For `need_pairs` see `render_row`.
    """

    def render_batch(batch: dict[str, list]) -> dict[str, list]:
        texts: dict[str, list] = {name: [] for name in TEXT_FEATURES}
        for i, broken in enumerate(batch["broken"]):
            text: dict[str, Any] = {}
            if not broken:
                try:
                    text = render_row(ParsedRow.from_json(batch["parsed"][i]), tokenizer, need_pairs)
                except BrokenRow as error:
                    broken = str(error)
            if broken and on_bad_row == "stop":
                place = f"{batch['file'][i]} row {batch['row'][i]}"
                raise UserError(f"{place}: {broken}; fix it or pass --on_bad_row skip")
            text |= {"subset": batch["subset"][i], "broken": broken}
            for name in TEXT_FEATURES:
                texts[name].append(text.get(name))
        return texts

    tokenizer_key = (tokenizer.chat_template, tokenizer.special_tokens_map, find_turn_end(tokenizer))
    key = (rows._fingerprint, *tokenizer_key, _merges_leading_space(tokenizer), need_pairs, on_bad_row, CACHE_VERSION)
    return rows.map(
        render_batch, batched=True, remove_columns=rows.column_names, features=TEXT_FEATURES,
        num_proc=workers if workers > 1 else None, new_fingerprint=Hasher.hash(key), desc="Reading pairs",
    )  # fmt: skip


def render_row(row: ParsedRow, tokenizer: Any, need_pairs: bool | None) -> dict[str, Any]:
    """Render a row as texts: the columns of `TEXT_FEATURES` but `subset` and `broken`.

    Args:
        row: as read; what is ignored here is added to its notes.
        tokenizer: its chat template writes conversations.
        need_pairs: True: the row must have two answers (DPO, evaluation). False, for SFT: only the chosen answer's
            last turn is learned. None takes pairs as DPO does, and rows with one answer too.

    Raises:
        BrokenRow: if this model, or this stage, cannot use the row.
    """
    if need_pairs and "rejected" not in row.answers:
        raise BrokenRow("expected 'chosen' and 'rejected', found one answer alone, which only SFT can use")
    if need_pairs is False:
        row = keep_last_turn(row)
    if isinstance(row.prompt, str):
        row = _place_system(row, tokenizer)
    if isinstance(row.prompt, str):
        text = _render_texts(row, tokenizer)
    elif tokenizer.chat_template is None:
        text = _render_hh_dialogue(row)
    else:
        text = _render_conversation(row, tokenizer)
    template = _get_template_source(tokenizer) if text["templated"] else ""
    for name in row.template_options:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            row.notes.append(unread_column_note(f"chat_template_kwargs.{name}"))
    messages = None if isinstance(row.prompt, str) else json.dumps(row.prompt)
    return {"rejected": None, **text, "messages": messages, "notes": row.notes}


def _place_system(row: ParsedRow, tokenizer: Any) -> ParsedRow:
    """Texts beside a system text become a conversation, since only a chat template knows where a system text goes."""
    if row.tools:
        raise BrokenRow("expected messages beside 'tools', found texts, which have no place for them; write messages")
    is_dialogue = HUMAN in row.prompt or row.prompt.endswith(ASSISTANT)
    has_template = tokenizer.chat_template is not None
    if row.system and (is_dialogue or not has_template):
        found = "texts in HH's form" if is_dialogue else "texts, and the model has no chat template"
        raise BrokenRow(f"expected messages beside 'system', found {found}; write messages, or begin 'prompt' with it")
    if row.system is None or is_dialogue or not has_template:
        return row
    row.prompt = [{"role": "user", "content": row.prompt}]
    if row.system:
        row.prompt.insert(0, {"role": "system", "content": row.system})
    row.answers = {name: [{"role": "assistant", "content": text}] for name, text in row.answers.items()}
    return row


def _render_texts(row: ParsedRow, tokenizer: Any) -> dict[str, Any]:
    prompt = row.prompt
    answers = row.answers
    space_ends_prompt = prompt.endswith(" ") and not all(text[:1].isspace() for text in answers.values())
    if space_ends_prompt and prompt.strip() and _merges_leading_space(tokenizer):
        # In a text "A: Yes" the space belongs to the token "ĠYes"; "Ġ" and "Yes" apart never occur.
        prompt = prompt[:-1]
        answers = {name: f" {text}" if text else "" for name, text in answers.items()}
        row.notes.append(SPACE_MOVED_NOTE)
    return {"prompt": prompt, "question": max(prompt.rfind(HUMAN), 0), "templated": False, **answers}


def _render_hh_dialogue(row: ParsedRow) -> dict[str, Any]:
    if row.tools:
        raise BrokenRow("expected a model with a chat template, which 'tools' need, found one without")
    prompt = "".join(map(_format_hh_turn, row.prompt)) + ASSISTANT
    answers = {
        name: "".join(map(_format_hh_turn, messages)).removeprefix(ASSISTANT) for name, messages in row.answers.items()
    }
    return {"prompt": prompt, "question": max(prompt.rfind(HUMAN), 0), "templated": False, **answers}


def _format_hh_turn(message: Message) -> str:
    turn = TURNS.get(message["role"])
    content = message["content"]
    if turn is None:
        role = printable(message["role"])
        raise BrokenRow(
            f"expected the roles {', '.join(TURNS)} (the model has no chat template), found {role!r}; "
            f"--role renames it, for example --role {role}=user"
        )
    if message.get("tool_calls"):
        raise BrokenRow("expected a model with a chat template, which 'tool_calls' need, found one without")
    return f"{turn} {content}" if content and turn.endswith(":") else turn + content


def _render_conversation(row: ParsedRow, tokenizer: Any) -> dict[str, Any]:
    """A conversation by the model's chat template: the prompt is what the texts of both answers begin with."""
    _check_template(row, tokenizer)
    render = partial(_apply_chat_template, tokenizer, {"tools": row.tools, **row.template_options})
    whole_texts = {name: render([*row.prompt, *messages]) for name, messages in row.answers.items()}
    prompt = common_prefix([render(row.prompt, add_generation_prompt=True), *whole_texts.values()])
    first = row.prompt[0]
    if first["role"] == "system" and (first["content"] or "").strip() not in prompt:
        raise BrokenRow("expected a chat template with a place for a system message, the model's leaves it out")
    answers = {}
    for name, messages in row.answers.items():
        # A template may end turns with text of its own: an answer without words is empty all the same.
        has_words = any(message["content"] or message.get("tool_calls") for message in messages)
        # The token that ends a turn is stripped; fitting adds it again where the answer stays whole.
        answers[name] = strip_turn_end(tokenizer, whole_texts[name][len(prompt) :]) if has_words else ""
    return {"prompt": prompt, "question": _find_question(render, row.prompt, prompt), "templated": True, **answers}


def _apply_chat_template(tokenizer: Any, options: dict[str, Any], messages: list[Message], **more: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **more)
    except Exception as error:  # a template is a program that came with the model: it may raise anything
        raise BrokenRow(f"expected messages that the model's chat template accepts, its error is: {error}") from None


def _check_template(row: ParsedRow, tokenizer: Any) -> None:
    """Refuse what the chat template would silently leave out or garble."""
    template = _get_template_source(tokenizer)
    for message in (*row.prompt, *(message for messages in row.answers.values() for message in messages)):
        role = message["role"]
        calls = message.get("tool_calls")
        if role not in TURNS and f"'{role}'" not in template and f'"{role}"' not in template:
            role = printable(role)
            raise BrokenRow(
                f"expected roles that the model's chat template knows, found {role!r}; "
                f"--role renames it, for example --role {role}=user"
            )
        if calls and "tool_calls" not in template:
            raise BrokenRow("expected a chat template that writes 'tool_calls', the model's leaves them out")
        words = [value for value in message.values() if isinstance(value, str)]
        if calls:
            words.append(json.dumps(calls, ensure_ascii=False))
        _check_special_tokens("\n".join(words), tokenizer)
    if row.tools:
        _check_special_tokens(json.dumps(row.tools, ensure_ascii=False), tokenizer)
        if not re.search(r"\btools\b", template):
            raise BrokenRow("expected a chat template that writes 'tools', the model's leaves them out")


def _get_template_source(tokenizer: Any) -> str:
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "\n".join(template.values())


def _check_special_tokens(words: str, tokenizer: Any) -> None:
    found = special_token_pattern(tokenizer).search(words)
    if found:
        raise BrokenRow(
            f"expected messages without special tokens, found {found.group()!r} in the text, which the model would "
            "read as that token"
        )


def _find_question(render: Callable[..., str], prompt: list[Message], text: str) -> int:
    """Where the last user message starts in the prompt's text, its header included."""
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        return 0
    until_question = prompt[: last + 1]
    # Repeating a message adds exactly the message and its header, and not the default system turn that some templates
    # put before a first message. Templates that insist on alternating roles need an answer in between.
    for between in ([], [{"role": "assistant", "content": "-"}]):
        try:
            once = render([*until_question, *between])
            twice = render([*until_question, *between, prompt[last]])
            start = len(render(until_question)) - (len(twice) - len(once))
            return min(max(start, 0), len(text))
        except BrokenRow:
            continue
    return 0


@cache
def special_token_pattern(tokenizer: Any) -> re.Pattern:
    """Any of a tokenizer's special tokens in a text."""
    tokens = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(tokens) or r"(?!)")


@cache
def _merges_leading_space(tokenizer: Any) -> bool:
    """Whether a space and the word after it are one token."""
    whole, *parts = (len(ids) for ids in tokenizer(["a a", "a ", "a"], add_special_tokens=False).input_ids)
    return whole < sum(parts)


def get_prompts(texts: Dataset) -> list[Prompt]:
    """The prompts of rows with the columns of `TEXT_FEATURES`: messages for a conversation, else the text."""
    columns = zip(texts["prompt"][:], texts["messages"][:], strict=True)
    return [json.loads(messages) if messages else prompt for prompt, messages in columns]


def get_readable_columns(texts: Dataset, tokenizer: Any, *completions: str) -> dict[str, list[str]]:
    """`prompt` and `completions` (by default `chosen`) as people read them, without a chat template's markers."""
    markers = special_token_pattern(tokenizer)
    readable = {"prompt": [format_prompt(prompt) for prompt in get_prompts(texts)]}
    for name in completions or ("chosen",):
        columns = zip(texts[name][:], texts["templated"][:], strict=True)
        readable[name] = [markers.sub("", text) if templated else text for text, templated in columns]
    return readable


def format_dialogue(messages: list[Message]) -> str:
    """A conversation as people read it: in HH's form, other roles by their names."""
    turns = []
    for message in messages:
        words = message.get("content") or ""
        if not words and message.get("tool_calls"):
            words = json.dumps(message["tool_calls"], ensure_ascii=False)
        name = f"\n\n{message['role'].capitalize()}:"
        if message["role"] in ("user", "assistant"):
            name = TURNS[message["role"]]
        turns.append(f"{name} {words}" if words else name)
    return "".join(turns)


def format_prompt(prompt: Prompt) -> str:
    """A prompt up to where the answer begins, as people and judges read it."""
    return prompt if isinstance(prompt, str) else format_dialogue(prompt) + ASSISTANT


def typed_to_dialogue(typed: str) -> str:
    """A typed question as a dialogue in HH's form; a typed dialogue only gets what it lacks."""
    text = f"\n\n{_clean_typed(typed)}"
    if HUMAN not in text:
        text = f"{HUMAN} {text[2:]}"
    return text if text.endswith(ASSISTANT) else text + ASSISTANT


def typed_to_messages(typed: str) -> list[Message]:
    """A typed question, or a dialogue in HH's form, as messages; text before the first turn is the system's."""
    text = f"\n\n{_clean_typed(typed)}"
    if HUMAN not in text:
        return [{"role": "user", "content": text[2:]}]
    system, *parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn, words in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": TURN_NAMES[turn], "content": words.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:  # where the answer begins
        messages.pop()
    return messages


def _clean_typed(typed: str) -> str:
    return typed.strip().encode(errors="replace").decode()  # half of a character cannot be written to a file
