"""Rows in every form are read as the same pair; a broken row is named by file and number, with what was expected."""

import json
from pathlib import Path
from typing import Any

import pytest
from examples import (
    ALTERNATING,
    BAD,
    CHATML,
    GOOD,
    HH,
    MESSAGES,
    PROMPT,
    SYSTEM,
    TOOLS,
    TURNS,
    encode_lines,
    load_train,
    render,
    with_template,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl.data_utils import extract_prompt

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.data.rows import BrokenRow, read_row, split_dialogues
from tinydpo.data.text import render_row
from tinydpo.errors import UserError

FORMS = {  # beside those of the documentation's table, which test_your_own_data.py reads
    "whole dialogues": HH,
    "prompt and texts": {"prompt": PROMPT, "chosen": " Well.", "rejected": " Bad, very bad."},
    "messages with a prompt": MESSAGES,
    "whole conversations beside a prompt": {"prompt": "Hi!", "chosen": TURNS + GOOD, "rejected": TURNS + BAD},
    "whole conversations beside a null prompt": {"prompt": None, "chosen": TURNS + GOOD, "rejected": TURNS + BAD},
    "one message each": {"messages": TURNS, "chosen": GOOD[0], "rejected": BAD[0]},
    "messages as JSON strings": {name: json.dumps(value) for name, value in MESSAGES.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str, tiny_tokenizer: Any):
    pair = render(FORMS[form], tiny_tokenizer)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (PROMPT, " Well.", " Bad, very bad.")
    assert pair["prompt"][pair["question"] :] == "\n\nHuman: How are you?\n\nAssistant:", "another question"
    assert render(FORMS[form], tiny_tokenizer, need_pairs=False) == pair, "SFT sees another pair than DPO"


turn = st.text(st.sampled_from("ab \n:漢🙂é"), max_size=8)


@given(st.lists(turn, min_size=1, max_size=3), st.lists(turn, min_size=1, max_size=3))
def test_splitting_dialogues_loses_nothing(first: list[str], second: list[str]):
    dialogues = {
        name: "".join(f"\n\nHuman:{i}\n\nAssistant:{text}" for i, text in enumerate(answers))
        for name, answers in (("chosen", first), ("rejected", second))
    }
    prompt, answers = split_dialogues(dialogues)
    assert prompt.endswith("\n\nAssistant:"), "a prompt does not end where an answer begins"
    for name, dialogue in dialogues.items():
        assert prompt + answers[name] == dialogue, "text is lost where a dialogue is split"
    rests = [answer.partition("\n\nAssistant:") for answer in answers.values()]
    assert not (rests[0][1] and rests[0][:2] == rests[1][:2]), "the dialogues share a later assistant turn"


def test_conversations_that_part_before_the_last_turn(tiny_tokenizer: Any):
    first, second = ([TURNS[0], {"role": "assistant", "content": text}, TURNS[2], *GOOD] for text in ("Yes?", "No."))
    pair = render({"chosen": first, "rejected": second}, tiny_tokenizer)
    assert pair["prompt"] == "\n\nHuman: Hi!\n\nAssistant:", "conversations are not split where they part"
    assert pair["chosen"] == " Yes?\n\nHuman: How are you?\n\nAssistant: Well.", "a conversation loses what follows"


def test_sft_learns_the_last_answer_only(tiny_tokenizer: Any):
    """Dialogues that part before their last turn hold a human turn in the answer: SFT must not learn to write it."""
    start = "\n\nHuman: Hi!\n\nAssistant:"
    chosen, rejected = f"{start} Yes?\n\nHuman: Why?\n\nAssistant: Because.", f"{start} No."
    talks = [
        [TURNS[0], {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}, last]
        for text, last in (("Yes?", {"role": "assistant", "content": "Because."}), ("No.", GOOD[0]))
    ]
    rows = (
        {"chosen": chosen, "rejected": rejected},
        {"prompt": start, "completion": chosen.removeprefix(start)},
        {"chosen": talks[0], "rejected": talks[1]},
    )
    for row in rows:
        pair = render(row, tiny_tokenizer, need_pairs=False)
        assert pair["chosen"] == " Because.", f"SFT learns {pair['chosen']!r} of {row}"
        assert pair["prompt"] == f"{start} Yes?\n\nHuman: Why?\n\nAssistant:", "the turns before are lost"
        assert pair["prompt"][pair["question"] :] == "\n\nHuman: Why?\n\nAssistant:", "another question"
    pair = render(rows[0], tiny_tokenizer)
    assert (pair["prompt"], pair["rejected"]) == (start, " No."), "DPO's pair is no longer split where it parts"
    assert render(rows[0], tiny_tokenizer, need_pairs=None) == pair, "`make inspect` shows other pairs than DPO's"


def test_prompt_that_its_texts_repeat_is_taken_once(tiny_tokenizer: Any):
    for prompt, chosen, rejected in (
        (PROMPT, " Well.", " Bad, very bad."),
        ("def add(a, b): # sums up", "\n return a", "\n pass"),
    ):
        repeated = render({"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected}, tiny_tokenizer)
        expected = render({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tiny_tokenizer)
        assert repeated["notes"][0] == "answers repeat the prompt, which is taken once"
        assert {**repeated, "notes": []} == {**expected, "notes": []}, f"{prompt!r} is trained on twice"
    for prompt, chosen, rejected in (
        ("Thank you", "Thank you too", "Thank you so much"),  # manners
        ("What is the capital of Italy", "What is the capital of Italy? Rome.", "Rome"),  # only one does
    ):
        pair = render({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tiny_tokenizer)
        assert (pair["chosen"], pair["rejected"]) == (chosen, rejected), f"an answer to {prompt!r} is cut"


def test_prompt_that_whole_conversations_do_not_repeat(tiny_tokenizer: Any):
    whole = {"chosen": [*TURNS, *GOOD], "rejected": [*TURNS, *BAD]}
    assert read_row({"prompt": TURNS[:1], **whole}).prompt == TURNS, "a prompt that is repeated is trained on twice"
    row = read_row({"prompt": [SYSTEM], **whole})
    assert row.prompt == [SYSTEM, *TURNS] and not row.notes, "the system message is lost"
    other = {"role": "user", "content": "Else?"}
    for prompt in ([other], [SYSTEM, other]):
        row = read_row({"prompt": prompt, **whole})
        assert row.prompt == TURNS and "'prompt' is not read: 'chosen'" in row.notes[0]


def test_hh_dialogues_without_their_first_line_breaks(tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    row = {"prompt": "Human: Hi?\n\nAssistant:", "chosen": " Well.", "rejected": " Bad."}
    text = render_row(read_row(row), tokenizer, need_pairs=True, chat=True)
    assert json.loads(text["messages"]) == [{"role": "user", "content": "Hi?"}], "'Human:' is part of the question"
    repeated = {"prompt": row["prompt"], "chosen": row["prompt"] + " Well.", "rejected": row["prompt"] + " Bad."}
    assert render(repeated, tiny_tokenizer)["chosen"] == " Well.", "the prompt is trained on twice"
    more = {name: f"Human: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: {name}" for name in ("chosen", "rejected")}
    assert render(more, tiny_tokenizer, need_pairs=False)["chosen"] == " chosen", "SFT learns to write a human turn"


def test_texts_that_begin_alike_are_read_as_trl_reads_them(tiny_tokenizer: Any, tmp_path: Path):
    row = {"chosen": "How are you? Well.", "rejected": "How are you? Bad, very bad."}
    split = load_train(tmp_path, tiny_tokenizer, row)
    text = split.texts[0]
    assert {name: text[name] for name in ("prompt", *row)} == extract_prompt(row), "the pair is not the one of TRL"
    assert split.summary["notes"] == {"there is no prompt: what both texts begin with is taken for it, as TRL does": 1}


def test_text_that_is_json_stays_text(tiny_tokenizer: Any):
    for answer in ('[{"name": "Ann", "role": "cook"}]', '{"from": "Rome", "to": "Oslo"}', "[{'role'"):
        pair = render({"prompt": "Who?", "chosen": answer, "rejected": "No."}, tiny_tokenizer)
        assert pair["chosen"] == answer, f"the answer {answer} is taken for messages"


def test_the_first_of_many_broken_rows_is_named(tiny_tokenizer: Any, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(encode_lines([{"question": "a"}] * 40))
    with pytest.raises(UserError, match=r"rows.jsonl row 1: "):
        load_pairs(DataArguments(dataset_name=str(file)), tiny_tokenizer, 128)


def test_columns_under_other_names():
    """The page's table has more of them, with message keys and roles."""
    expected = read_row(MESSAGES)
    row = {"prompt": TURNS, "chosen": BAD, "rejected": GOOD}
    assert read_row(row, {"chosen": "rejected", "rejected": "chosen"}) == expected, "two names cannot change places"
    null = {"prompt": None, "question": TURNS, "chosen": GOOD, "rejected": BAD}
    assert read_row(null, {"question": "prompt"}) == expected, "a null column is taken for a second prompt"
    with pytest.raises(BrokenRow, match="two columns map to 'prompt', one of them 'question'"):
        read_row({"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"}, {"question": "prompt"})


def test_tools_and_options_as_json_strings(tiny_tokenizer: Any):
    options = {"enable_thinking": False}
    as_json = {"tools": json.dumps(TOOLS), "chat_template_kwargs": json.dumps(options)}
    expected = read_row(MESSAGES | {"tools": TOOLS, "chat_template_kwargs": options})
    assert read_row(MESSAGES | as_json) == expected
    empty = {"tools": None, "chat_template_kwargs": {"enable_thinking": None}, "system": None}
    assert read_row(MESSAGES | empty) == read_row(MESSAGES), "null keys change a row"


# kind: (row, part of the message) or (row, part of the message, chat template)
BROKEN = {
    "cut JSON": (b'{"chosen": "a\n', 'expected one JSON object, found \'{"chosen": "a\''),
    "a list": (b'["a", "b"]\n', "expected a JSON object with keys, found a list"),
    "half a character": (b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "b"}\n', "found half of a character"),
    "other keys": ({"question": "a", "answer": "b"}, "found 'question', 'answer'; --column names other columns"),
    "no pair": ({"prompt": PROMPT, "completion": " a"}, "found a single answer, which only SFT can use"),
    "null for a text": ({**HH, "rejected": None}, "expected 'rejected' to be a string, found null"),
    "no assistant turn": ({**HH, "rejected": "Hello you"}, "found no shared assistant turn"),
    "texts without a common start": ({"chosen": "Hello ", "rejected": "Bye"}, "found no shared assistant turn"),
    "an empty text": ({"chosen": "", "rejected": ""}, "found no shared assistant turn"),
    "messages as Python writes them": (
        {**MESSAGES, "chosen": str(GOOD)},
        "'chosen' as a list or as JSON, found \"[{'",
    ),
    "an answer that OpenAI would not learn": (
        {**MESSAGES, "chosen": [{**GOOD[0], "weight": 0}]},
        "expected an answer to learn, found a message marked 'weight': 0",
    ),
    "an answer that axolotl would not learn": (
        {**MESSAGES, "rejected": [{**BAD[0], "train": False}]},
        "expected an answer to learn, found a message marked 'train': False",
    ),
    "good and bad": ({"question": "a", "good": "b", "bad": "c"}, "--column question=prompt good=chosen bad=rejected;"),
    "Alpaca's": ({"instruction": "a", "output": "b"}, "for example --column instruction=prompt output=completion;"),
    "a human turn at the end": (
        {**HH, "chosen": HH["chosen"] + "\n\nHuman: Thanks."},
        "expected 'chosen' to end in an assistant turn",
    ),
    "a number for a prompt": ({**MESSAGES, "prompt": 5}, "expected 'prompt' to be a string or a list"),
    "other message keys": (
        {**MESSAGES, "prompt": [{"from": "human", "value": "Hi"}]},
        "found 'from': a string, 'value': a string; --column names other keys",
    ),
    "no content": ({**MESSAGES, "rejected": [{"role": "assistant", "content": None}]}, "'rejected' to hold messages"),
    "another role for the assistant": (
        {side: [TURNS[0], {"role": "gpt", "content": side}] for side in ("chosen", "rejected")},
        "found none (roles: 'user', 'gpt'); --role names other roles",
    ),
    "pictures": (
        {**MESSAGES, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "expected the content of messages in 'prompt' to be text, found [{'type': 'image'}]",
    ),
    "a role that the template does not know": (
        {**MESSAGES, "prompt": [{"role": "Human", "content": "Hi"}]},
        "found 'Human'; --role renames it, for example --role Human=user",
        CHATML,
    ),
    "roles that the template refuses": (
        {**MESSAGES, "prompt": [TURNS[0], *TURNS]},
        "expected messages that the model's chat template accepts; it raised: roles must alternate",
        ALTERNATING,
    ),
    "system beside dialogues": (HH | {"system": "a"}, "for 'system', found texts in HH's form", CHATML),
    "a system text that is none": (MESSAGES | {"system": ["a"]}, "expected 'system' to be a string, found a list"),
    "tools that the template leaves out": (MESSAGES | {"tools": TOOLS}, "a chat template that writes 'tools'", CHATML),
    "tool calls without a template": (
        {**MESSAGES, "prompt": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{}]}, TURNS[2]]},
        "a chat template that writes 'tool_calls'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_row_is_named_by_file_and_number(kind: str, tiny_tokenizer: Any, tmp_path: Path):
    row, expected, *template = BROKEN[kind]
    tokenizer = with_template(tiny_tokenizer, template[0] if template else None)
    good = MESSAGES if template else HH
    with pytest.raises(UserError) as caught:
        load_train(tmp_path, tokenizer, good, b" \r\n", row, good)
    message = str(caught.value)
    assert f"{tmp_path / 'data'}/train.jsonl row 3: " in message, "the message does not name file and row"
    assert expected in message, "the message does not say what was expected"
    assert "fix it or pass --on_bad_row skip" in message and "\n" not in message


def test_skipped_rows_are_counted(tiny_tokenizer: Any, tmp_path: Path):
    broken = [row for row, _, *template in BROKEN.values() if not template]
    rows = [HH, *broken, {**HH, "chosen": HH["rejected"]}, HH]
    split = load_train(tmp_path, tiny_tokenizer, *rows, on_bad_row="skip")
    assert split.summary["dropped"] == {"broken row": len(broken), "identical completions": 1}
    assert (split.summary["pairs_in"], split.summary["pairs_kept"]) == (len(rows), 2)
    assert split.texts["prompt"][:] == [PROMPT] * 2 and len(split.pairs) == 2, "a dropped pair is trained on"
    assert split.summary["completion_tokens_kept"] < 1, "dropped pairs do not count as lost"

    with pytest.raises(UserError, match=r"no pair of the train split is left.*identical completions"):
        load_train(tmp_path, tiny_tokenizer, {**HH, "chosen": HH["rejected"]})


def test_odd_files_give_the_pair_they_hold(tiny_tokenizer: Any, tmp_path: Path):
    prompt = "\n\nHuman: ما اسمك؟ 👩‍👩‍👧 é \u200f\n\nAssistant:"
    chosen, rejected = " שלום 🙂\0", " e\u0301\u0302 \u2028 \x85"
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    line = encode_lines([row])
    raw = json.dumps(row, ensure_ascii=False).encode()
    unread = line.replace(b"}", b', "score": NaN, "x": ' + b"[" * 500 + b"]" * 500 + b"}")
    for odd in (raw, b"\xef\xbb\xbf" + line, line.replace(b"\n", b"\r\n"), unread):
        (text,) = load_train(tmp_path, tiny_tokenizer, odd).texts
        assert (text["prompt"], text["chosen"], text["rejected"]) == (prompt, chosen, rejected), odd


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "\ud800"]), "content": anything},
        optional={"tool_calls": anything},
    ),
    max_size=3,
)
columns = st.sampled_from(["prompt", "chosen", "rejected", "completion", "messages", "system", "tools", "input"])
any_row = anything | st.dictionaries(columns, anything | messages, max_size=5)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(st.lists(st.binary(max_size=60) | any_row.map(lambda row: encode_lines([row])), min_size=1, max_size=4))
def test_any_rows_are_pairs_or_one_sentence(tmp_path: Path, tiny_tokenizer: Any, rows: list[bytes]):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([*rows, encode_lines([HH] * 4)]))
    for template, on_bad_row in ((None, "stop"), (None, "skip"), (CHATML, "skip")):
        try:
            data = DataArguments(dataset_name=str(file), on_bad_row=on_bad_row)
            load_pairs(data, with_template(tiny_tokenizer, template), 128)
        except UserError as error:
            assert str(file) in str(error), f"the message does not name the file: {error}"
