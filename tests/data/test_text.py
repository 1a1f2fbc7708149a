"""Pairs as texts: chat templates, HH's form, further columns of a row, and prompts as people read and type them."""

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
    OTHER_END,
    PROMPT,
    SYSTEM,
    TEXTS,
    THINKING,
    TOOLS,
    TURNS,
    load_train,
    render,
    with_template,
)
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import apply_chat_template

from tinydpo.data.inspect import format_data_notes
from tinydpo.data.rows import BrokenRow
from tinydpo.data.text import format_dialogue, format_prompt, typed_to_dialogue, typed_to_messages


def test_chat_template_with_a_default_system_message(tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    pair = render({**MESSAGES, "prompt": TURNS[2:]}, tokenizer)
    question = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert pair["prompt"] == "<|im_start|>system\nBe kind.<|im_end|>\n" + question, "the prompt is not the template's"
    assert pair["prompt"][pair["question"] :] == question, "the default system message counts as part of the question"
    assert (pair["chosen"], pair["rejected"]) == ("Well.", "Bad, very bad."), "an answer is not the assistant's words"
    repeated = render({**MESSAGES, "prompt": [*TURNS, GOOD[0], TURNS[2]]}, tokenizer)
    assert repeated["prompt"][repeated["question"] :] == question, "a question asked twice is taken at its first place"
    own = render({**MESSAGES, "prompt": [SYSTEM, *TURNS]}, tokenizer)
    assert own["prompt"].startswith("<|im_start|>system\nBe brief."), "the user's system message is lost"


def test_system_messages_and_ends_of_turns_stay(tiny_tokenizer: Any):
    pair = render({**MESSAGES, "prompt": [SYSTEM, *TURNS]}, tiny_tokenizer)
    assert pair["prompt"] == "\n\nBe brief." + PROMPT, "without a template it opens the dialogue"
    pair = render(MESSAGES, with_template(tiny_tokenizer, OTHER_END))
    assert pair["chosen"] == "Well.<end>", "the template's own end of turn is lost"


def test_chat_template_that_insists_on_alternating_roles(tiny_tokenizer: Any):
    for turns in (TURNS, TURNS[2:]):
        pair = render({**MESSAGES, "prompt": turns}, with_template(tiny_tokenizer, ALTERNATING))
        assert pair["prompt"].endswith("[INST] How are you? [/INST]"), "the prompt is not the template's"
        assert pair["prompt"][pair["question"] :] == "[INST] How are you? [/INST]", "another question"
        assert (pair["chosen"], pair["rejected"]) == (" Well.", " Bad, very bad."), "the end token stays in the text"


def test_what_a_chat_template_would_garble_or_leave_out_is_refused(tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    end = tokenizer.eos_token
    with pytest.raises(BrokenRow, match="without special tokens, found"):
        render({**MESSAGES, "rejected": [{"role": "assistant", "content": f"Bad.{end}"}]}, tokenizer)
    with pytest.raises(BrokenRow, match="without special tokens, found"):
        dated = with_template(tiny_tokenizer, "{{ date }}" + CHATML)
        render({**MESSAGES, "chat_template_kwargs": {"date": dated.eos_token}}, dated)
    users_only = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BrokenRow, match="writes system messages"):
        render({**MESSAGES, "prompt": [SYSTEM, *TURNS]}, with_template(tiny_tokenizer, users_only))


@pytest.mark.parametrize("template", [None, OTHER_END])
def test_answer_without_words_is_dropped(template: str | None, tiny_tokenizer: Any, tmp_path: Path):
    row = {**MESSAGES, "rejected": [{"role": "assistant", "content": ""}]}
    split = load_train(tmp_path, with_template(tiny_tokenizer, template), row, MESSAGES)
    assert split.summary["dropped"] == {"empty completion": 1}


BESIDE = {"system": "Be brief.", "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("names", [["system"], ["tools"], ["chat_template_kwargs"], BESIDE])
def test_columns_beside_messages_are_written_as_trl_writes_them(names: list[str], tiny_tokenizer: Any):
    thinking = with_template(tiny_tokenizer, THINKING)
    row = MESSAGES | {name: BESIDE[name] for name in names}
    pair = render(row, thinking)
    example = {key: value for key, value in row.items() if key not in ("system", "tools")}
    if "system" in row:
        example["prompt"] = [SYSTEM, *TURNS]
    theirs = apply_chat_template(example, thinking, tools=row.get("tools"))
    assert pair["prompt"] == theirs["prompt"], "the prompt is not the one TRL trains on"
    for side in ("chosen", "rejected"):
        assert pair[side] + thinking.eos_token == theirs[side].rstrip(), f"{side} is not the one TRL trains on"
    assert pair["prompt"] != render(MESSAGES, thinking)["prompt"], "the column has no effect"
    assert json.loads(pair["messages"]) == example["prompt"], "the conversation is not kept as one"
    assert pair["notes"] == []


def test_system_beside_texts_makes_messages_of_them(tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    messages = {**MESSAGES, "prompt": [SYSTEM, TURNS[2]]}
    expected = render(messages, tokenizer)
    assert render(TEXTS | {"system": "Be brief."}, tokenizer) == expected, "a system text is lost or misplaced"
    assert render(messages | {"system": "Be brief."}, tokenizer) == expected, "a system message is written twice"
    assert render(TEXTS | {"system": ""}, tokenizer)["templated"], "rows of one file are written in two forms"


def test_tool_turns_of_openai(tiny_tokenizer: Any):
    thinking = with_template(tiny_tokenizer, THINKING)
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    turns = [TURNS[0], call, {"role": "tool", "content": "Sun."}]
    pair = render({**MESSAGES, "prompt": turns}, thinking)
    assert '"arguments": {"city": "Rome"}' in pair["prompt"], "a call's arguments are written as text within text"
    assert "None" not in pair["prompt"] and pair["chosen"] == "Well.", "a message that only calls a tool says None"
    alone = render({"messages": [*turns, *GOOD]}, thinking, need_pairs=False)
    assert (alone["prompt"], alone["chosen"]) == (pair["prompt"], pair["chosen"]), "SFT reads tool turns differently"
    del call["content"]
    pair = render({**MESSAGES, "chosen": [call]}, thinking)
    assert pair["chosen"].startswith('<call>{"name": "weather"'), "an answer that only calls a tool is lost"


@pytest.mark.parametrize("name", ["chat_template", "messages", "eos_token", "tokenize", "add_generation_prompt"])
def test_a_row_cannot_replace_the_template_or_its_arguments(name: str, tiny_tokenizer: Any):
    thinking = with_template(tiny_tokenizer, THINKING)
    row = {**MESSAGES, "chat_template_kwargs": {name: "{{ messages }}", "enable_thinking": False}}
    pair = render(row, thinking)
    expected = render({**MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}, thinking)
    assert pair.pop("notes") == [f"column 'chat_template_kwargs.{name}' is not read"]
    assert expected.pop("notes") == [] and pair == expected, f"{name} of a row changes what the model reads"


@pytest.mark.parametrize(
    "row", [TEXTS, {**HH, "prompt": PROMPT, "chosen": " Well.", "rejected": " Bad, very bad."}, HH]
)
@pytest.mark.parametrize("template", [CHATML, None])
def test_chat_writes_texts_as_messages(row: dict[str, str], template: str | None, tiny_tokenizer: Any, tmp_path: Path):
    tokenizer = with_template(tiny_tokenizer, template)
    turns = [TURNS[2]] if row is TEXTS else TURNS
    split = load_train(tmp_path, tokenizer, row, chat=True)
    text = split.texts[0]
    expected = render({**MESSAGES, "prompt": turns}, tokenizer)
    assert {name: text[name] for name in expected} == expected, "texts do not become the conversation that they are"
    plain = load_train(tmp_path, tokenizer, row)
    noted = {"a plain text, without the model's chat template (--chat true uses it)": 1}
    assert plain.summary["notes"] == (noted if row is TEXTS and template else {}), (
        "texts are trained on without a word"
    )
    assert plain.texts[0]["prompt"] == row.get("prompt", PROMPT), "texts change although nobody asked for it"


def test_space_at_the_prompts_end_goes_to_the_answers(gpt2_tokenizer: Any, tmp_path: Path):
    prompt = "Q: What is the capital of France?\nA: "
    row = {"prompt": prompt, "chosen": "Paris", "rejected": "Rome is."}
    empty = {**row, "chosen": ""}
    split = load_train(tmp_path, gpt2_tokenizer, row, {**row, "prompt": prompt.rstrip()}, empty)
    fitted, text = split.pairs[0], split.texts[0]
    whole = gpt2_tokenizer(prompt + "Paris").input_ids
    assert fitted["prompt_ids"] + fitted["chosen_ids"][:-1] == whole, "the tokens are not those of the text"
    assert gpt2_tokenizer.convert_ids_to_tokens(fitted["chosen_ids"])[0] == "ĠParis", "ĠParis is learnt from Paris"
    assert text["prompt"] + text["chosen"] == prompt + "Paris", "the text is another one"
    assert split.summary["notes"] == {"a space at the prompt's end moves to the answers, as the tokenizer expects": 2}
    assert split.summary["dropped"] == {"empty completion": 1}, "a moved space makes an answer of none"


def test_every_column_that_is_not_read_is_noted(tiny_tokenizer: Any, tmp_path: Path):
    rows = [
        {**MESSAGES, "score": 0.5, "response": "x", "source": ""},
        {**MESSAGES, "score": 0, "messages": TURNS, "source": None},
        {**MESSAGES, "chat_template_kwargs": {"verbosity": 2}},
        {**HH, "chat_template_kwargs": {"enable_thinking": False}},
        {**MESSAGES, "chosen": BAD},
        b"{\n",
    ]
    summary = load_train(tmp_path, with_template(tiny_tokenizer, THINKING), *rows, on_bad_row="skip").summary
    assert summary["notes"] == {
        "column 'score' is not read": 2,
        "column 'chat_template_kwargs.enable_thinking' is not read": 1,
        "column 'chat_template_kwargs.verbosity' is not read": 1,
        "column 'messages' is not read": 1,
        "column 'response' is not read": 1,
    }
    assert summary["templated"] == 4, "rows that the chat template wrote are miscounted"
    clean = {**summary, "dropped": {}, "notes": {}}
    line = format_data_notes({"train": summary, "test": clean})
    assert line.startswith("Data: train: 33.3% of 6 pairs dropped (1 broken row, 1 identical"), line
    assert "column 'score' is not read (2 rows)" in line and "test" not in line and "\n" not in line, line
    assert format_data_notes({"test": clean}) == "", "a line is printed about nothing"


def test_another_template_or_stage_is_another_cache(tiny_tokenizer: Any, tmp_path: Path):
    row = {"chosen": TURNS + GOOD, "rejected": TURNS + BAD}
    tokenizers = [with_template(tiny_tokenizer, template) for template in (None, CHATML, ALTERNATING)]
    texts = [load_train(tmp_path, tokenizer, row).texts for tokenizer in tokenizers for _ in range(2)]
    assert len({text._fingerprint for text in texts}) == 3, "another template gets the old texts, or none is kept"
    assert len({text[0]["prompt"] for text in texts}) == 3, "the chat template has no effect"
    twice = {"chosen": [*TURNS, *GOOD, TURNS[0], *GOOD], "rejected": [*TURNS, *BAD]}
    answers = [
        load_train(tmp_path, tiny_tokenizer, twice, need_pairs=need).texts[0]["chosen"] for need in (True, False)
    ]
    assert answers[0] != answers[1], "SFT gets DPO's texts"


words = (
    st.text(st.characters(exclude_categories=["Cs"])).map(str.strip).filter(lambda text: text and "\n\n" not in text)
)


@given(st.lists(words, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2))
def test_people_and_models_see_the_same_turns(turns: list[str]):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    shown = format_prompt(messages)
    assert typed_to_messages(shown) == messages, "a dialogue as it is shown is read as another"
    assert typed_to_dialogue(shown) == shown, "a shown conversation is not in HH's form"
    with_system = typed_to_messages(f"Be kind.{shown}")
    assert with_system == [{"role": "system", "content": "Be kind."}, *messages], "text before the turns is lost"


def test_other_roles_and_calls_are_shown():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}
    shown = format_dialogue([SYSTEM, call, {"role": "tool", "content": "12:00"}])
    assert shown == '\n\nSystem: Be brief.\n\nAssistant: [{"function": {"name": "clock"}}]\n\nTool: 12:00'
