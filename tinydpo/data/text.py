"""A row becomes one text pair: prompt, chosen, rejected, and where the question starts.

`forms` says what was asked and what was answered. Texts stay as they are; a conversation takes the model's chat
template, or HH's `Human:`/`Assistant:` form where the model has none.
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
    NO_RENAMES,
    BrokenRow,
    ColumnNames,
    Message,
    ParsedRow,
    common_prefix,
    decode_row,
    printable,
    read_row,
    rename_columns,
    unread_column_note,
)
from tinydpo.errors import UserError
from tinydpo.models.stop_tokens import find_turn_end, strip_turn_end

TURNS = {"system": "\n\n", "user": HUMAN, "assistant": ASSISTANT}
TEXT_FEATURES = Features(
    {
        "prompt": Value("string"),
        "question": Value("int64"),  # where in the prompt the last human turn starts, in characters
        "chosen": Value("string"),
        "rejected": Value("string"),  # null for SFT rows without one
        "messages": Value("string"),  # the messages of a conversation's prompt as JSON, null for texts
        "templated": Value("bool"),  # written by a chat template: special tokens in the text are meant as such
        "subset": Value("string"),
        "notes": List(Value("string")),  # what of the row was not taken as it stands
        "broken": Value("string"),  # why a skipped row could not be read, else null
    }
)
SPACE_MOVED_NOTE = "a space at the prompt's end goes to the answers, where tokens have it"


def render_texts(
    records: Dataset,
    tokenizer: Any,
    need_pairs: bool | None,
    on_bad_row: str,
    workers: int,
    names: ColumnNames = NO_RENAMES,
) -> Dataset:
    """Read records into text pairs (the columns of `TEXTS`), in the same order.

    Args:
        records: columns `file`, `row`, `subset`, `record`, as `sources.load_records` gives them.
        tokenizer: its chat template writes conversations; without one they take HH's `Human:`/`Assistant:` form.
        need_pairs: whether a row must have a rejected answer (DPO, evaluation); see `forms.read`.
        on_bad_row: `"stop"` or `"skip"`; a skipped row is kept as an empty one with its reason in `broken`.
        workers: processes to read with.
        names: what the data call their columns and roles.

    Raises:
        UserError: for the first broken row, naming file, row and what was expected.
    """

    def texts_of(batch: dict[str, list]) -> dict[str, list]:
        texts = {name: [] for name in TEXT_FEATURES}
        for file, row, subset, record in zip(*(batch[k] for k in ("file", "row", "subset", "record")), strict=True):
            try:
                text = render_row(rename_columns(decode_row(record), names), tokenizer, need_pairs)
            except BrokenRow as error:
                if on_bad_row == "stop":
                    advice = "fix it or pass --on_bad_row skip"
                    raise UserError(f"{file} row {row}: {error}; {advice}") from None
                text = {"broken": str(error).encode(errors="replace").decode()}
            text = {"subset": subset, **text}
            for name in TEXT_FEATURES:
                texts[name].append(text.get(name))
        return texts

    key = (records._fingerprint, tokenizer.chat_template, tokenizer.special_tokens_map, need_pairs, on_bad_row)
    key += (
        sorted(names.columns.items()),
        sorted(names.roles.items()),
        _merges_leading_space(tokenizer),
        find_turn_end(tokenizer),
    )
    fingerprint = Hasher.hash((*key, CACHE_VERSION))
    return records.map(
        texts_of, batched=True, remove_columns=records.column_names, features=TEXT_FEATURES,
        num_proc=workers if workers > 1 else None, new_fingerprint=fingerprint, desc="Reading pairs",
    )  # fmt: skip


def render_row(row: dict[str, Any], tokenizer: Any, need_pairs: bool | None) -> dict[str, Any]:
    """Turn one row into the columns of `TEXTS`, but for `broken`, and `subset` where it has none.

    Raises:
        BrokenRow: if the row has none of the known forms, saying what was expected.
    """
    form = read_row(row, need_pairs)
    if isinstance(form.prompt, str):
        form = _wrap_with_system(form, tokenizer)
    write = _render_texts if isinstance(form.prompt, str) else _render_messages
    pair = {"messages": None, **write(form, tokenizer), "notes": form.notes}
    if isinstance(row.get("subset"), str):
        pair["subset"] = row["subset"]
    for name in ("prompt", "chosen", "rejected", "subset"):
        try:
            (pair.get(name) or "").encode()
        except UnicodeEncodeError:
            raise BrokenRow(f"expected valid text in {name!r}, found half of a character") from None
    return pair


def _wrap_with_system(form: ParsedRow, tokenizer: Any) -> ParsedRow:
    """Texts beside a system message are a conversation where the model has a template: that alone knows its place.

    HH's form has one too, but in it texts are dialogues already, whose start is theirs to say.
    """
    if form.tools:
        raise BrokenRow("expected messages beside 'tools', found texts, in which tools have no place; write messages")
    templated = tokenizer.chat_template is not None
    dialogue = HUMAN in form.prompt or form.prompt.endswith(ASSISTANT)
    if form.system and (dialogue or not templated):
        why = "texts in HH's form" if dialogue else "texts, and the model has no chat template"
        raise BrokenRow(
            f"expected messages beside 'system', found {why}; write messages, or let 'prompt' begin with it"
        )
    if form.system is None or dialogue or not templated:
        return form
    system = [{"role": "system", "content": form.system}] if form.system else []
    form.prompt = [*system, {"role": "user", "content": form.prompt}]
    form.answers = {name: [{"role": "assistant", "content": text}] for name, text in form.answers.items()}
    return form


def _render_texts(form: ParsedRow, tokenizer: Any) -> dict[str, Any]:
    prompt, answers = form.prompt, form.answers
    apart = prompt.endswith(" ") and not all(text[:1].isspace() for text in answers.values())
    if (
        apart and prompt.strip() and _merges_leading_space(tokenizer)
    ):  # "A: " + "Yes" is never two tokens "Ġ", "Yes" in a text
        prompt, answers = prompt[:-1], {name: text and f" {text}" for name, text in answers.items()}
        form.notes.append(SPACE_MOVED_NOTE)
    form.notes += _list_unused_options(form, "")
    return {"prompt": prompt, "question": max(prompt.rfind(HUMAN), 0), "templated": False, **_name_answers(answers)}


def _render_messages(form: ParsedRow, tokenizer: Any) -> dict[str, Any]:
    prompt, answers = form.prompt, form.answers
    said = json.dumps(prompt)
    if tokenizer.chat_template is None:
        if form.tools:
            raise BrokenRow("expected a model with a chat template, which 'tools' need, found one without")
        text = "".join(map(_format_hh_turn, prompt)) + ASSISTANT
        texts = {k: "".join(map(_format_hh_turn, messages)).removeprefix(ASSISTANT) for k, messages in answers.items()}
        question = max(text.rfind(HUMAN), 0)
        form.notes += _list_unused_options(form, "")
        return {"prompt": text, "question": question, "templated": False, "messages": said, **_name_answers(texts)}
    _check_template_support(form, tokenizer)
    render = partial(_apply_chat_template, tokenizer, {"tools": form.tools, **form.options})
    wholes = {name: render([*prompt, *messages]) for name, messages in answers.items()}
    text = common_prefix([render(prompt, add_generation_prompt=True), *wholes.values()])
    if prompt[0]["role"] == "system" and (prompt[0]["content"] or "").strip() not in text:
        raise BrokenRow("expected a chat template with a place for a system message, the model's leaves it out")
    # The template ends a turn with a token; fitting puts it back where the completion stays whole.
    texts = {k: strip_turn_end(tokenizer, whole[len(text) :]) for k, whole in wholes.items()}
    # A template may end turns with text of its own: an answer without a word is empty all the same.
    texts = {
        k: text if any(m["content"] or m.get("tool_calls") for m in answers[k]) else "" for k, text in texts.items()
    }
    question = _find_last_question(render, prompt, text)
    return {"prompt": text, "question": question, "templated": True, "messages": said, **_name_answers(texts)}


def _check_template_support(form: ParsedRow, tokenizer: Any) -> None:
    """Refuse what the template would leave out, or write down as it stands, without a word."""
    template = _template_source(tokenizer.chat_template)
    for message in (message for messages in (form.prompt, *form.answers.values()) for message in messages):
        role, calls = message["role"], message.get("tool_calls")
        if role not in TURNS and f"'{role}'" not in template and f'"{role}"' not in template:
            told = f"expected roles that the model's chat template knows, found {printable(role)!r}"
            raise BrokenRow(f"{told}; --role says which one it is, for example --role {printable(role)}=user")
        if calls and "tool_calls" not in template:
            raise BrokenRow("expected a chat template that writes 'tool_calls', the model's leaves them out")
        words = "\n".join(value for value in message.values() if isinstance(value, str))
        _reject_special_tokens(words + json.dumps(calls, ensure_ascii=False) * bool(calls), tokenizer)
    if form.tools:
        _reject_special_tokens(json.dumps(form.tools, ensure_ascii=False), tokenizer)
        if not re.search(r"\btools\b", template):
            raise BrokenRow("expected a chat template that writes 'tools', the model's leaves them out")
    form.notes += _list_unused_options(form, template)


def _reject_special_tokens(words: str, tokenizer: Any) -> None:
    if found := special_token_pattern(tokenizer).search(words):
        told = f"expected messages without the model's special token {found.group()!r} in their text"
        raise BrokenRow(f"{told}: between the template's own it would be read as that token")


def _list_unused_options(form: ParsedRow, template: str) -> list[str]:
    """Notes on options that a template does not ask for."""
    unused = (name for name in form.options if not re.search(rf"\b{re.escape(name)}\b", template))
    return [unread_column_note(f"chat_template_kwargs.{name}") for name in unused]


def _template_source(template: str | dict[str, str]) -> str:
    return template if isinstance(template, str) else "\n".join(template.values())


def _format_hh_turn(message: Message) -> str:
    turn, content = TURNS.get(message["role"]), message["content"]
    if turn is None:
        role = printable(message["role"])
        raise BrokenRow(
            f"expected the roles {', '.join(TURNS)} (the model has no chat template), found {role!r}; "
            f"--role says which one it is, for example --role {role}=user"
        )
    if message.get("tool_calls"):
        raise BrokenRow("expected a model with a chat template, which 'tool_calls' need, found one without")
    return f"{turn} {content}" if content and turn.endswith(":") else turn + content


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


def _apply_chat_template(tokenizer: Any, options: dict[str, Any], messages: list[Message], **more: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **more)
    except Exception as error:  # a template is a program of the model's: it may raise anything
        raise BrokenRow(f"expected messages that the model's chat template accepts, it says: {error}") from None


def _find_last_question(render: Callable[..., str], prompt: list[Message], text: str) -> int:
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
            once, twice = (render([*upto, *between, *more]) for more in ([], [prompt[last]]))
            return min(max(len(render(upto)) - (len(twice) - len(once)), 0), len(text))
        except BrokenRow:
            continue
    return 0


def _name_answers(texts: dict[str, str]) -> dict[str, str | None]:
    chosen, *rejected = texts.values()
    return {"chosen": chosen, "rejected": rejected[0] if rejected else None}


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
