"""What stands beside prompt and answers, or under other names, and what is told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_dialogues import ALTERNATING, BAD, CHATML, GOOD, HH, PROMPT, TURNS, pairs_of, with_template
from trl.data_utils import apply_chat_template

from tinydpo.data.inspect import format_data_notes
from tinydpo.data.rows import ColumnNames, rename_columns
from tinydpo.data.text import BrokenRow, render_row

PAIR = {"prompt": TURNS, "chosen": GOOD, "rejected": BAD}
TEXTS = {"prompt": "How are you?", "chosen": "Well.", "rejected": "Bad, very bad."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
# Qwen3's way: tools, calls of them and an empty thought where thinking is off.
THINKING = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% for m in messages %}<turn>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' and enable_thinking is false %}<think></think>{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}{{ eos_token }}\n{% endfor %}{# knows 'tool' #}"
    "{% if add_generation_prompt %}<turn>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)


@pytest.fixture
def thinking(tiny_tokenizer: Any) -> Any:
    return with_template(tiny_tokenizer, THINKING)


BESIDE = {
    "a system text": {"system": "Be brief."},
    "tools as a list": {"tools": TOOLS},
    "options of the template": {"chat_template_kwargs": {"enable_thinking": False}},
    "all of them": {"system": "Be brief.", "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_messages_is_written_as_trl_writes_it(kind: str, thinking: Any):
    row = PAIR | BESIDE[kind]
    pair = render_row(row, thinking, True)
    example = {key: value for key, value in row.items() if key not in ("system", "tools")}
    example["prompt"] = [SYSTEM] * ("system" in row) + TURNS
    theirs = apply_chat_template(example, thinking, tools=row.get("tools"))
    assert pair["prompt"] == theirs["prompt"], f"{kind}: the prompt is not the one TRL trains on"
    for side in ("chosen", "rejected"):
        assert pair[side] + thinking.eos_token == theirs[side].rstrip(), f"{kind}: {side} is not the one TRL trains on"
    assert pair["prompt"] != render_row(PAIR, thinking, True)["prompt"], f"{kind}: dropped in silence"
    assert json.loads(pair["messages"]) == example["prompt"], f"{kind}: the conversation is not kept as one"
    assert pair["notes"] == [], f"{kind}: said not to be read"


def test_tools_and_options_as_json(thinking: Any):
    as_json = {"tools": json.dumps(TOOLS), "chat_template_kwargs": json.dumps({"enable_thinking": False})}
    as_such = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}
    assert render_row(PAIR | as_json, thinking, True) == render_row(PAIR | as_such, thinking, True), "JSON is not read"
    nothing = {"tools": None, "chat_template_kwargs": {"enable_thinking": None}, "system": None}
    assert render_row(PAIR | nothing, thinking, True) == render_row(PAIR, thinking, True), "null keys change a row"


def test_system_beside_texts_makes_messages_of_them(tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    messages = {"prompt": [SYSTEM, TURNS[2]], "chosen": GOOD, "rejected": BAD}
    expected = render_row(messages, tokenizer, True)
    assert render_row(TEXTS | {"system": "Be brief."}, tokenizer, True) == expected, (
        "a system text is lost or misplaced"
    )
    rows = [TEXTS | {"system": system} for system in ("", "Be brief.")]
    templated = [render_row(row, tokenizer, True)["templated"] for row in rows]
    assert templated == [True, True], "rows of one file are written in two forms, by whether 'system' is empty"
    twice = {**messages, "system": "Be brief."}
    assert render_row(twice, tokenizer, True) == expected, "a system message is written twice"


def test_a_tool_turn(thinking: Any):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather"}}],
    }
    call["tool_calls"][0]["function"]["arguments"] = '{"city": "Rome"}'  # JSON, as OpenAI sends it
    turns = [TURNS[0], call, {"role": "tool", "content": "Sun."}]
    pair = render_row({"prompt": turns, "chosen": GOOD, "rejected": BAD}, thinking, True)
    assert '"arguments": {"city": "Rome"}' in pair["prompt"], "a call's arguments are written as text within text"
    assert "None" not in pair["prompt"] and pair["chosen"] == "Well.", "a message that only calls a tool says None"
    alone = render_row({"messages": [*turns, *GOOD]}, thinking, False)
    assert (alone["prompt"], alone["chosen"]) == (pair["prompt"], pair["chosen"]), "SFT reads tool turns otherwise"


MESSAGES = {"messages": [SYSTEM, *TURNS, *GOOD]}


def test_sft_learns_the_last_answer_only(tiny_tokenizer: Any):
    """Dialogues that part before their last turn hold a human's turn in the answer: SFT must not learn to write it."""
    start = "\n\nHuman: Hi!\n\nAssistant:"
    chosen, rejected = f"{start} Yes?\n\nHuman: Why?\n\nAssistant: Because.", f"{start} No."
    as_turns = [
        [TURNS[0], {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}, last]
        for text, last in (("Yes?", {"role": "assistant", "content": "Because."}), ("No.", GOOD[0]))
    ]
    rows = (
        {"chosen": chosen, "rejected": rejected},
        {"prompt": start, "chosen": chosen, "rejected": rejected},
        {"prompt": start, "completion": chosen.removeprefix(start)},
        dict(zip(("chosen", "rejected"), as_turns, strict=True)),
    )
    for row in rows:
        pair = render_row(row, tiny_tokenizer, False)
        assert pair["chosen"] == " Because.", f"SFT learns {pair['chosen']!r} of {row}"
        assert pair["prompt"] == f"{start} Yes?\n\nHuman: Why?\n\nAssistant:", "the turns before are lost"
        assert pair["prompt"][pair["question"] :] == "\n\nHuman: Why?\n\nAssistant:", "the question is another one"
    pair = render_row(rows[0], tiny_tokenizer, True)
    assert (pair["prompt"], pair["rejected"]) == (start, " No."), "DPO's pair is no longer split where it parts"
    assert render_row(rows[0], tiny_tokenizer, None) == pair, "`make inspect` shows other pairs than DPO's"


def test_a_prompt_that_its_texts_repeat_is_taken_once(tiny_tokenizer: Any):
    for prompt, rests in (
        (PROMPT, (" Well.", " Bad, very bad.")),
        ("Q: What is the capital?\nA: ", ("Rome", "Paris")),
        ("def add(a, b): # sums up", ("\n return a", "\n pass")),
    ):
        whole = {"prompt": prompt, **{s: prompt + r for s, r in zip(("chosen", "rejected"), rests, strict=True)}}
        apart = {"prompt": prompt, **dict(zip(("chosen", "rejected"), rests, strict=True))}
        read, expected = (render_row(row, tiny_tokenizer, True) for row in (whole, apart))
        assert read["notes"][0] == "answers repeat the prompt, which is taken once", "it is not told"
        assert {**read, "notes": []} == {**expected, "notes": []}, f"{prompt!r} is trained on twice"
    for prompt, chosen, rejected in (
        ("Thank you", "Thank you too", "Thank you so much"),  # manners
        ("What is the capital of Italy", "What is the capital of Italy? Rome.", "Rome"),  # only one does
        ("How do I write a list", "How do I write a listing?", "How do I write a listicle?"),  # other words
    ):
        pair = render_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tiny_tokenizer, True)
        assert (pair["chosen"], pair["rejected"]) == (chosen, rejected), f"an answer to {prompt!r} is cut"


def test_a_space_at_the_prompts_end_goes_to_the_answers(gpt2_tokenizer: Any, tmp_path: Path):
    prompt = "Q: What is the capital of France?\nA: "
    row = {"prompt": prompt, "chosen": "Paris", "rejected": "Rome is."}
    split = pairs_of(tmp_path, gpt2_tokenizer, row, {**row, "chosen": "Lyon"}, {**row, "prompt": prompt.rstrip()})
    fitted, text = split.pairs[0], split.texts[0]
    whole = gpt2_tokenizer(prompt + "Paris").input_ids
    assert fitted["prompt_ids"] + fitted["chosen_ids"][:-1] == whole, "the tokens are not those of the text"
    assert gpt2_tokenizer.convert_ids_to_tokens(fitted["chosen_ids"])[0] == "ĠParis", "ĠParis is learnt from Paris"
    assert text["prompt"] + text["chosen"] == prompt + "Paris", "the text is another one"
    note = "a space at the prompt's end goes to the answers, where tokens have it"
    assert split.summary["notes"] == {note: 2}, "it is not told, or miscounted"
    spaced = render_row({**row, "chosen": " Paris", "rejected": " Rome"}, gpt2_tokenizer, True)
    assert (spaced["prompt"], spaced["notes"]) == (prompt, []), "a space is moved before another"
    empty = pairs_of(tmp_path, gpt2_tokenizer, {**row, "chosen": ""}, row)
    assert empty.summary["dropped"] == {"empty completion": 1}, "a moved space makes an answer of none"


SHAREGPT = ColumnNames(
    {"conversations": "messages", "from": "role", "value": "content"}, {"human": "user", "gpt": "assistant"}
)
RENAMED = {
    "a column": (ColumnNames({"question": "prompt"}), {"question": TURNS, "chosen": GOOD, "rejected": BAD}, PAIR),
    "columns, keys and roles": (
        SHAREGPT,
        {
            "conversations": [{"from": "human", "value": "Hi!"}],
            "chosen": {"from": "gpt", "value": "Well."},
            "rejected": {"from": "gpt", "value": "Bad, very bad."},
        },
        {"prompt": TURNS[:1], "chosen": GOOD, "rejected": BAD},
    ),
    "two that change places": (
        ColumnNames({"chosen": "rejected", "rejected": "chosen"}),
        {**PAIR, "chosen": BAD, "rejected": GOOD},
        PAIR,
    ),
    "a column that is there, but null": (
        ColumnNames({"question": "prompt"}),
        {"prompt": None, "question": TURNS, "chosen": GOOD, "rejected": BAD},
        PAIR,
    ),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_other_names(kind: str, tiny_tokenizer: Any):
    names, row, expected = RENAMED[kind]
    tokenizer = with_template(tiny_tokenizer, CHATML)
    given = json.dumps(row)
    assert render_row(rename_columns(row, names), tokenizer, True) == render_row(expected, tokenizer, True), (
        f"{kind}: misread"
    )
    assert json.dumps(row) == given, f"{kind}: reading a row changes it"


def test_two_columns_that_claim_one_name(tiny_tokenizer: Any):
    with pytest.raises(BrokenRow, match="expected one column for 'prompt', found two"):
        rename_columns({"prompt": "a", "question": "b"}, ColumnNames({"question": "prompt"}))


def test_other_names_are_another_cache(tiny_tokenizer: Any, tmp_path: Path):
    row = {"a": PROMPT + " Well.", "b": PROMPT + " Bad.", "chosen": None, "rejected": None}
    (tmp_path / "data").mkdir()
    splits = []
    for column in (["a=chosen", "b=rejected"], ["b=chosen", "a=rejected"], ["a=chosen", "b=rejected"]):
        test = tmp_path / "data" / "test.jsonl"
        test.write_text(json.dumps(row) + "\n")
        splits.append(pairs_of_named(tmp_path, tiny_tokenizer, row, column))
    assert [split.texts[0]["chosen"] for split in splits] == [" Well.", " Bad.", " Well."], "a cache of other names"
    assert splits[0].texts._fingerprint == splits[2].texts._fingerprint, "the same rows are read twice"


def pairs_of_named(tmp_path: Path, tokenizer: Any, row: dict, column: list[str]) -> Any:
    from tinydpo.config.arguments import DataArguments
    from tinydpo.data.pairs import load_pairs

    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return load_pairs(DataArguments(dataset_name=str(tmp_path / "data"), column=column), tokenizer, 128)["train"]


def test_nothing_is_left_out_unsaid(thinking: Any, tmp_path: Path):
    """Every column that is not read is named, with its rows; null and empty ones say nothing."""
    rows = [
        {**PAIR, "score": 0.5, "response": "x", "source": ""},
        {**PAIR, "score": 0, "messages": TURNS, "source": None},
        {**PAIR, "chat_template_kwargs": {"verbosity": 2}},
        {**HH, "chat_template_kwargs": {"enable_thinking": False}},
        {**PAIR, "chosen": BAD},
        b"{",
    ]
    split = pairs_of(tmp_path, thinking, *rows, on_bad_row="skip")
    assert split.summary["notes"] == {
        "column 'score' is not read": 2,
        "column 'chat_template_kwargs.enable_thinking' is not read": 1,
        "column 'chat_template_kwargs.verbosity' is not read": 1,
        "column 'messages' is not read": 1,
        "column 'response' is not read": 1,
    }, "a column is dropped in silence, or called unread that is read"
    line = format_data_notes({"train": split.summary, "test": {**split.summary, "dropped": {}, "notes": {}}})
    assert "\n" not in line and line.startswith("Data: train: 33.3% of 6 pairs dropped (1 broken row, 1 identical"), (
        line
    )
    assert "column 'score' is not read (2 rows)" in line and "test" not in line, f"it is not all told: {line}"
    assert format_data_notes({"test": {**split.summary, "dropped": {}, "notes": {}}}) == "", (
        "a line is printed about nothing"
    )


BESIDE_BROKEN = {
    "system beside texts without a template": (
        None,
        TEXTS | {"system": "a"},
        "beside 'system', found texts, and the model",
    ),
    "system beside HH's dialogues": (CHATML, HH | {"system": "a"}, "beside 'system', found texts in HH's form"),
    "system that is no text": (CHATML, PAIR | {"system": ["a"]}, "expected 'system' to be a string, found a list"),
    "two system messages": (
        CHATML,
        {**PAIR, "prompt": [SYSTEM, *TURNS], "system": "a"},
        "expected one system message, found 'system' and another one",
    ),
    "system that the template leaves out": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        PAIR | {"system": "Be brief."},
        "a place for a system message",
    ),
    "tools beside texts": (THINKING, TEXTS | {"tools": TOOLS}, "expected messages beside 'tools', found texts"),
    "tools without a template": (None, PAIR | {"tools": TOOLS}, "a chat template, which 'tools' need"),
    "tools that the template leaves out": (CHATML, PAIR | {"tools": TOOLS}, "a chat template that writes 'tools'"),
    "tools that are none": (THINKING, PAIR | {"tools": "weather"}, "expected 'tools' to be a list, found a string"),
    "options that are none": (THINKING, PAIR | {"chat_template_kwargs": [1]}, "to be an object, found a list"),
    "options that are not the template's": (
        THINKING,
        PAIR | {"chat_template_kwargs": {"tokenize": True}},
        "expected messages that the model's chat template accepts",
    ),
    "a role that the template does not know": (
        CHATML,
        {**PAIR, "prompt": [{"role": "Human", "content": "Hi"}]},
        "chat template knows, found 'Human'; --role says which one it is, for example --role Human=user",
    ),
    "a role without a template": (
        None,
        {**PAIR, "prompt": [{"role": "human", "content": "Hi"}]},
        "found 'human'; --role says which one it is, for example --role human=user",
    ),
    "tool calls that the template leaves out": (
        CHATML,
        {**PAIR, "prompt": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{}]}, TURNS[2]]},
        "a chat template that writes 'tool_calls'",
    ),
    "a special token in tools": (
        THINKING,
        PAIR | {"tools": [{"type": "function", "function": {"name": "<|endoftext|>"}}]},
        "without the model's special token '<|endoftext|>'",
    ),
    "a conversation that ends in a user turn": (
        CHATML,
        {"chosen": [*TURNS[:2], TURNS[2]], "rejected": [TURNS[0], *BAD]},
        "expected 'chosen' to end in an assistant message, found one by 'user' there",
    ),
    "… as an answer": (CHATML, {**PAIR, "rejected": [*BAD, TURNS[0]]}, "expected 'rejected' to end in an assistant"),
    "a dialogue that ends in a human turn": (
        None,
        {**HH, "chosen": HH["chosen"] + "\n\nHuman: Thanks."},
        "expected 'chosen' to end in an assistant turn",
    ),
    "pictures": (
        CHATML,
        {**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]},
        "expected the content of messages in 'prompt' to be text, found a part 'image'",
    ),
}


@pytest.mark.parametrize("kind", BESIDE_BROKEN)
def test_what_has_no_place_is_a_broken_row(kind: str, tiny_tokenizer: Any):
    template, row, expected = BESIDE_BROKEN[kind]
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    with pytest.raises(BrokenRow) as caught:
        render_row(row, tokenizer, True)
    assert expected in str(caught.value), f"{kind}: the message is {caught.value!s}"


WAYS_OUT = {
    "Alpaca's": (
        {"instruction": "Curry?", "input": "", "output": "Gladly!"},
        False,
        "--column instruction=prompt output=completion",
    ),
    "Orca's": ({"question": "Curry?", "chosen": "Gladly!", "rejected": "No."}, True, "--column question=prompt"),
    "pairs under other names": (
        {"q": "Curry?", "good": "Yes", "bad": "No"},
        True,
        "--column q=prompt good=chosen bad=rejected",
    ),
    "one other name": ({"prompt": "Curry?", "chosen": "Yes", "bad": "No"}, True, "--column bad=rejected"),
    "an answer under another name": ({"prompt": "Curry?", "output": "Yes"}, False, "--column output=completion"),
    "ShareGPT's list": (
        {"conversations": [{"from": "human", "value": "Hi"}]},
        False,
        "--column conversations=messages",
    ),
    "ShareGPT's pairs": (
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}},
        True,
        "--column conversations=messages",
    ),
    "ShareGPT's keys": ({"messages": [{"value": "Hello", "from": "gpt"}]}, False, "--column from=role value=content"),
    "ShareGPT's roles": (
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yes"}]},
        False,
        "--role gpt=assistant",
    ),
}


@pytest.mark.parametrize("kind", WAYS_OUT)
def test_a_form_with_other_names_is_told_the_way_out(kind: str, tiny_tokenizer: Any):
    row, need_pairs, way_out = WAYS_OUT[kind]
    with pytest.raises(BrokenRow) as caught:
        render_row(row, with_template(tiny_tokenizer, ALTERNATING), need_pairs)
    assert way_out in str(caught.value), f"{kind}: the message is {caught.value!s}"
