"""A parsed row becomes one text pair: prompt, chosen, rejected, and where the last human turn starts.

Texts stay as they are. A conversation takes the model's chat template, or HH's `Human:`/`Assistant:` form if the model
has none. The second half has the way back: prompts as people read and type them.
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain
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
    is_hh_prompt,
    keep_last_turn,
)
from tinydpo.errors import UserError
from tinydpo.models.stop_tokens import find_turn_end, strip_turn_end

Prompt = str | list[Message]

ROLES = ("system", "user", "assistant")  # others need a chat template
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


def render_texts(
    rows: Dataset, tokenizer: Any, need_pairs: bool | None, on_bad_row: str, workers: int, chat: bool
) -> Dataset:
    """Render parsed rows (columns of `splits.ROW_FEATURES`) as text pairs (`TEXT_FEATURES`), in the same order.

    With `on_bad_row="stop"` the first broken row is a UserError that names its file and number; with `"skip"` it
    becomes an empty row with the reason in `broken`. For `need_pairs` and `chat` see `render_row`.
    """

    def render_batch(batch: dict[str, list]) -> dict[str, list]:
        texts: dict[str, list] = {name: [] for name in TEXT_FEATURES}
        broken_rows = []
        for i, broken in enumerate(batch["broken"]):
            text: dict[str, Any] = {}
            if not broken:
                try:
                    text = render_row(ParsedRow.from_json(batch["parsed"][i]), tokenizer, need_pairs, chat)
                except BrokenRow as error:
                    broken = str(error)
            if broken:
                broken_rows.append((batch["file"][i], batch["row"][i], broken))
            text |= {"subset": batch["subset"][i], "broken": broken}
            for name in TEXT_FEATURES:
                texts[name].append(text.get(name))
        if broken_rows and on_bad_row == "stop":
            file, number, reason = min(broken_rows)  # holding out shuffles rows
            raise UserError(f"{file} row {number}: {reason}; fix it or pass --on_bad_row skip")
        return texts

    special = (_get_special_tokens(tokenizer), _reads_special_tokens_in_text(tokenizer), find_turn_end(tokenizer))
    template = (tokenizer.chat_template, tokenizer.special_tokens_map, _merges_leading_space(tokenizer))
    key = (rows._fingerprint, *special, *template, need_pairs, chat, on_bad_row, CACHE_VERSION)
    return rows.map(
        render_batch, batched=True, remove_columns=rows.column_names, features=TEXT_FEATURES,
        num_proc=workers if workers > 1 else None, new_fingerprint=Hasher.hash(key), desc="Reading pairs",
    )  # fmt: skip


def render_row(row: ParsedRow, tokenizer: Any, need_pairs: bool | None, chat: bool = False) -> dict[str, Any]:
    """Render a row as texts: the columns of `TEXT_FEATURES` but `subset` and `broken`.

    With `need_pairs` the row must have two answers (DPO, evaluation). False, for SFT: only the chosen answer's last
    turn is learned. None takes pairs as DPO does, and rows with one answer too. `chat` makes messages of texts. What
    cannot be used is a BrokenRow.
    """
    if need_pairs and "rejected" not in row.answers:
        raise BrokenRow("expected 'chosen' and 'rejected', found a single answer, which only SFT can use")
    if need_pairs is False:
        row = keep_last_turn(row)
    if isinstance(row.prompt, str):
        row = _choose_form(row, tokenizer, chat)
    template = ""
    if isinstance(row.prompt, list) and tokenizer.chat_template:
        template = tokenizer.get_chat_template(tools=row.tools)
    _check_template(row, template, tokenizer)
    if template or _reads_special_tokens_in_text(tokenizer):
        _reject_special_tokens(row, tokenizer)
    if isinstance(row.prompt, str):
        text = _render_texts(row, tokenizer)
    elif not template:
        text = _render_hh_dialogue(row)
    else:
        text = _render_conversation(row, tokenizer)
    messages = None if isinstance(row.prompt, str) else json.dumps(row.prompt)
    return {"rejected": None, **text, "templated": bool(template), "messages": messages, "notes": row.notes}


def _choose_form(row: ParsedRow, tokenizer: Any, chat: bool) -> ParsedRow:
    """Texts become a conversation with `chat`, or beside a system text: only a chat template knows where that goes."""
    is_hh = is_hh_prompt(row.prompt) or row.prompt.endswith(ASSISTANT)
    if not chat and (row.system is None or is_hh or tokenizer.chat_template is None):
        if row.system:
            raise BrokenRow(
                "expected messages and a model with a chat template for 'system', found texts in HH's form, or a "
                "model without a chat template; write messages, pass --chat true, or begin 'prompt' with it"
            )
        if tokenizer.chat_template and not is_hh:
            row.notes.append("a plain text, without the model's chat template (--chat true uses it)")
        return row
    if is_hh_prompt(row.prompt):
        start = row.prompt.rstrip().removesuffix(ASSISTANT) + ASSISTANT
        prompt = typed_to_messages(start)
        answers = {name: typed_to_messages(start + text)[len(prompt) :] for name, text in row.answers.items()}
    else:
        prompt = [{"role": "user", "content": row.prompt}]
        answers = {name: [{"role": "assistant", "content": text}] for name, text in row.answers.items()}
    system = [{"role": "system", "content": row.system}] if row.system else []
    return replace(row, prompt=[*system, *prompt], answers=answers)


def _check_template(row: ParsedRow, template: str, tokenizer: Any) -> None:
    """Refuse what the chat template ("" for none) would silently leave out, and note options that it does not read."""
    messages: list[Message] = []
    if not isinstance(row.prompt, str):
        messages = [*row.prompt, *chain.from_iterable(row.answers.values())]
    needed = {"tools": row.tools, "tool_calls": any(message.get("tool_calls") for message in messages)}
    for name, is_used in needed.items():
        if is_used and name not in template:
            raise BrokenRow(
                f"expected messages and a chat template that writes {name!r}, found texts or a model without one"
            )
    for role in dict.fromkeys(message["role"] for message in messages):
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise BrokenRow(
                f"expected the roles {', '.join(ROLES)} or a role of the chat template, found {role!r}; "
                f"--role renames it, for example --role {role}=user"
            )
    for message in messages[len(row.prompt) :]:
        for mark in ("weight", "train"):  # OpenAI's and axolotl's
            if message.get(mark) == 0:  # or false
                raise BrokenRow(f"expected an answer to learn, found a message marked {mark!r}: {message[mark]}")
    if row.template_options:
        # A row may set what the template asks for, but no argument of `apply_chat_template`, such as another template.
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters
        reserved = {"messages", *arguments, *tokenizer.special_tokens_map}
        unread = [name for name in row.template_options if name in reserved or name not in template]
        row.notes += [f"column 'chat_template_kwargs.{name}' is not read" for name in unread]
        row.template_options = {name: value for name, value in row.template_options.items() if name not in unread}


def _render_texts(row: ParsedRow, tokenizer: Any) -> dict[str, Any]:
    prompt = row.prompt
    answers = row.answers
    space_ends_prompt = prompt.endswith(" ") and not all(text[:1].isspace() for text in answers.values())
    if space_ends_prompt and prompt.strip() and _merges_leading_space(tokenizer):
        # In a text "A: Yes" the space belongs to the token "ĠYes"; "Ġ" and "Yes" apart never occur.
        prompt = prompt[:-1]
        answers = {name: f" {text}" if text else "" for name, text in answers.items()}
        row.notes.append("a space at the prompt's end moves to the answers, as the tokenizer expects")
    return {"prompt": prompt, "question": max(prompt.rfind(HUMAN), 0), **answers}


def _render_hh_dialogue(row: ParsedRow) -> dict[str, Any]:
    prompt = format_dialogue(row.prompt, system="\n\n") + ASSISTANT
    answers = {name: format_dialogue(messages).removeprefix(ASSISTANT) for name, messages in row.answers.items()}
    return {"prompt": prompt, "question": max(prompt.rfind(HUMAN), 0), **answers}


def _render_conversation(row: ParsedRow, tokenizer: Any) -> dict[str, Any]:
    """A conversation by the model's chat template: the prompt is what the texts of both answers begin with."""

    def render(messages: list[Message], **more: Any) -> str:
        options = {"tools": row.tools, **row.template_options, **more}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise BrokenRow(f"expected messages that the model's chat template accepts; it raised: {error}") from None

    whole_texts = {name: render([*row.prompt, *messages]) for name, messages in row.answers.items()}
    prompt = common_prefix([render(row.prompt, add_generation_prompt=True), *whole_texts.values()])
    first = row.prompt[0]
    if first["role"] == "system" and (first.get("content") or "").strip() not in prompt:
        raise BrokenRow("expected a chat template that writes system messages; this model's leaves them out")
    answers = {}
    for name, messages in row.answers.items():
        # A template may end turns with text of its own: an answer without words is empty all the same.
        has_words = any(message.get("content") or message.get("tool_calls") for message in messages)
        # The token that ends a turn is stripped; fitting adds it again where the answer stays whole.
        answers[name] = strip_turn_end(tokenizer, whole_texts[name][len(prompt) :]) if has_words else ""
    return {"prompt": prompt, "question": _find_question(render, row.prompt, prompt), **answers}


def _reject_special_tokens(row: ParsedRow, tokenizer: Any) -> None:
    """Refuse text of the row that the model would read as one of its special tokens."""
    given = [row.prompt, row.answers, row.tools, row.template_options]
    found = _get_special_tokens(tokenizer).search(json.dumps(given, ensure_ascii=False))
    if found:
        raise BrokenRow(
            f"expected text without special tokens, found {found.group()!r}, which the model would read as that token"
        )


@cache
def _reads_special_tokens_in_text(tokenizer: Any) -> bool:
    """Whether special tokens are also in the model's own vocabulary, as Unigram's: plain text then gives them too."""
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.pop(tokenizer.unk_token_id, None)  # any unknown character gives this one
    text = "\n".join(f"{token} {token}" for token in special.values())
    plain = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return not special.keys().isdisjoint(plain)


@cache
def _get_special_tokens(tokenizer: Any) -> re.Pattern:
    """Matches any of a tokenizer's special tokens."""
    tokens = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(tokens) or r"(?!)")


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
    markers = _get_special_tokens(tokenizer)
    readable = {"prompt": [format_prompt(prompt) for prompt in get_prompts(texts)]}
    for name in completions or ("chosen",):
        columns = zip(texts[name][:], texts["templated"][:], strict=True)
        readable[name] = [markers.sub("", text) if templated else text for text, templated in columns]
    return readable


def format_dialogue(messages: list[Message], system: str = "\n\nSystem:") -> str:
    """A conversation as people read it: in HH's form, other roles by their names."""
    names = {"system": system, "user": HUMAN, "assistant": ASSISTANT}
    turns = []
    for message in messages:
        words = message.get("content") or ""
        if not words and message.get("tool_calls"):
            words = json.dumps(message["tool_calls"], ensure_ascii=False)
        name = names.get(message["role"], f"\n\n{message['role'].capitalize()}:")
        turns.append(f"{name} {words}" if words and name.endswith(":") else name + words)
    return "".join(turns)


def format_prompt(prompt: Prompt) -> str:
    """A prompt up to where the answer begins, as people and judges read it."""
    return prompt if isinstance(prompt, str) else format_dialogue(prompt) + ASSISTANT


def typed_to_dialogue(typed: str) -> str:
    """A typed question as a dialogue in HH's form; a typed dialogue only gets what it lacks."""
    return format_dialogue(typed_to_messages(typed), system="\n\n") + ASSISTANT


def typed_to_messages(typed: str) -> list[Message]:
    """A typed question, or a dialogue in HH's form, as messages; text before the first turn is the system's."""
    text = "\n\n" + typed.strip().encode(errors="replace").decode()  # half of a character cannot be written to a file
    if HUMAN not in text:
        return [{"role": "user", "content": text[2:]}]
    system, *parts = re.split(f"({HUMAN}|{ASSISTANT})", text)
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn, words in zip(parts[::2], parts[1::2], strict=True):
        messages.append({"role": TURN_NAMES[turn], "content": words.strip()})
    if messages[-1] == {"role": "assistant", "content": ""}:  # where the answer begins
        messages.pop()
    return messages
