"""Rows in every form become the same text pair; a broken row is named with its file, number and what was expected."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.data.rows import split_dialogues
from tinydpo.data.splits import RECORD_FEATURES
from tinydpo.data.text import BrokenRow, render_row, render_texts
from tinydpo.errors import UserError

PROMPT = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("Well.", "Bad, very bad."))
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral's way: roles must alternate, no header before an answer, the end token ends it.
ALTERNATING = (
    "<|start|>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Gemma's way: what ends a turn is not the end token.
OTHER_END = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    if template == CHATML:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def pairs_of(
    tmp_path: Path, tokenizer: Any, *rows: Any, need_pairs: bool = True, max_length: int = 128, **options: Any
):
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    (folder / "train.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    (folder / "test.jsonl").write_text(json.dumps({"chosen": PROMPT + " a", "rejected": PROMPT + " b"}) + "\n")
    data = DataArguments(dataset_name=str(folder), **options)
    return load_pairs(data, tokenizer, max_length, need_pairs)["train"]


HH = {"chosen": PROMPT + " Well.", "rejected": PROMPT + " Bad, very bad."}
FORMS = {
    "whole dialogues": HH,
    "prompt and texts": {"prompt": PROMPT, "chosen": " Well.", "rejected": " Bad, very bad."},
    "messages with prompt": {"prompt": TURNS, "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": TURNS + GOOD, "rejected": TURNS + BAD},
    "whole conversations beside a prompt": {"prompt": "Hi!", "chosen": TURNS + GOOD, "rejected": TURNS + BAD},
    "whole conversations beside a null prompt": {"prompt": None, "chosen": TURNS + GOOD, "rejected": TURNS + BAD},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str, tiny_tokenizer: Any):
    pair = render_row(FORMS[form], tiny_tokenizer, need_pairs=True)
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (PROMPT, " Well.", " Bad, very bad."), (
        f"{form}: the pair is not read as written"
    )
    assert pair["prompt"][pair["question"] :] == "\n\nHuman: How are you?\n\nAssistant:", f"{form}: another question"
    assert render_row(FORMS[form], tiny_tokenizer, need_pairs=False) == pair, f"{form}: SFT sees another pair than DPO"


@pytest.mark.parametrize("key", ["completion", "response"])
def test_sft_forms(key: str, tiny_tokenizer: Any):
    for row in ({"prompt": PROMPT, key: " Well."}, {"prompt": TURNS, key: GOOD}):
        pair = render_row(row, tiny_tokenizer, need_pairs=False)
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (PROMPT, " Well.", None), (
            f"{key} is not the answer"
        )
        with pytest.raises(BrokenRow, match="'chosen' is missing"):
            render_row(row, tiny_tokenizer, need_pairs=True)


def test_string_prompt_beside_messages_is_a_user_message(tiny_tokenizer: Any):
    pair = render_row({"prompt": "Hi?", "chosen": GOOD, "rejected": BAD}, tiny_tokenizer, True)
    assert pair["prompt"] == "\n\nHuman: Hi?\n\nAssistant:", "a prompt in words is not asked as a question"


def test_dialogues_that_part_before_the_last_turn(tiny_tokenizer: Any):
    start = "\n\nHuman: Hi!\n\nAssistant:"
    chosen = f"{start} Yes?\n\nHuman: Why?\n\nAssistant: Because."
    rejected = f"{start} No.\n\nHuman: Oh.\n\nAssistant: Sorry, I meant something longer."
    for row in ({"chosen": chosen, "rejected": rejected}, {"chosen": rejected, "rejected": chosen}):
        pair = render_row(row, tiny_tokenizer, True)
        assert pair["prompt"] == start, "the pair is not split where its dialogues part"
        for side in ("chosen", "rejected"):
            assert pair["prompt"] + pair[side] == row[side], f"{side} is garbled: its prompt is the other one's"
    first, second = ([TURNS[0], {"role": "assistant", "content": text}, TURNS[2], *GOOD] for text in ("Yes?", "No."))
    pair = render_row({"chosen": first, "rejected": second}, tiny_tokenizer, True)
    assert pair["prompt"] == start, "conversations are not split where they part"
    assert pair["chosen"] == " Yes?\n\nHuman: How are you?\n\nAssistant: Well.", "a conversation loses what follows"


turn = st.text(st.sampled_from("ab \n:漢🙂é"), max_size=8)


@given(st.lists(turn, min_size=1, max_size=3), st.lists(turn, min_size=1, max_size=3))
def test_split_dialogues_loses_nothing(first: list[str], second: list[str]):
    dialogues = {
        name: "".join(f"\n\nHuman:{i}\n\nAssistant:{text}" for i, text in enumerate(answers))
        for name, answers in (("chosen", first), ("rejected", second))
    }
    prompt, answers = split_dialogues(dialogues)
    assert prompt.endswith("\n\nAssistant:"), "a prompt does not end where an answer begins"
    for name, dialogue in dialogues.items():
        assert prompt + answers[name] == dialogue, "text is lost where a dialogue is split"
    tails = list(answers.values())
    rest = [tail.find("\n\nAssistant:") for tail in tails]
    later = min(rest) >= 0 and tails[0][: rest[0]] == tails[1][: rest[1]]
    assert not later, "the dialogues share a later assistant turn than the one they are split at"


def test_chat_template_with_a_default_system_message(tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, CHATML)
    pair = render_row({"prompt": TURNS[2:], "chosen": GOOD, "rejected": BAD}, tokenizer, True)
    question = "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    assert pair["prompt"] == "<|im_start|>system\nBe kind.<|im_end|>\n" + question, "the prompt is not the template's"
    assert pair["prompt"][pair["question"] :] == question, "the default system message counts as part of the question"
    assert (pair["chosen"], pair["rejected"]) == ("Well.", "Bad, very bad."), "an answer is not the assistant's words"
    longer = render_row({"chosen": TURNS + GOOD, "rejected": TURNS + BAD}, tokenizer, True)
    assert longer["prompt"][longer["question"] :] == question, "the question is not the last user message"
    repeated = render_row({"prompt": [*TURNS, GOOD[0], TURNS[2]], "chosen": GOOD, "rejected": BAD}, tokenizer, True)
    assert repeated["prompt"][repeated["question"] :] == question, "a question asked twice is taken at its first place"
    system = [{"role": "system", "content": "Be rude."}, *TURNS]
    own = render_row({"prompt": system, "chosen": GOOD, "rejected": BAD}, tokenizer, True)
    assert own["prompt"].startswith("<|im_start|>system\nBe rude."), "the user's system message is lost"


@pytest.mark.parametrize("turns", [TURNS, TURNS[2:]])
def test_chat_template_that_insists_on_alternating_roles(turns: list, tiny_tokenizer: Any):
    tokenizer = with_template(tiny_tokenizer, ALTERNATING)
    pair = render_row({"prompt": turns, "chosen": GOOD, "rejected": BAD}, tokenizer, True)
    assert pair["prompt"].endswith("[INST] How are you? [/INST]"), "the prompt is not the template's"
    question = pair["prompt"][pair["question"] :]
    assert question == "[INST] How are you? [/INST]", f"the question is taken to be {question!r}"
    assert (pair["chosen"], pair["rejected"]) == (" Well.", " Bad, very bad."), "the end token stays in the text"
    with pytest.raises(BrokenRow, match="roles must alternate"):
        render_row({"prompt": [TURNS[0], *turns], "chosen": GOOD, "rejected": BAD}, tokenizer, True)


def test_chat_template_with_another_end_of_turn(tiny_tokenizer: Any, tmp_path: Path):
    tokenizer = with_template(tiny_tokenizer, OTHER_END)
    pair = render_row({"prompt": TURNS, "chosen": GOOD, "rejected": BAD}, tokenizer, True)
    assert pair["chosen"] == "Well.<end>", "the template's own end of turn is lost"
    nothing = [{"role": "assistant", "content": ""}]
    fitted = pairs_of(tmp_path, tokenizer, {"prompt": TURNS, "chosen": GOOD, "rejected": nothing}, HH)
    assert fitted.summary["dropped"] == {"empty completion": 1}, "an answer without a word is trained on"


def test_without_a_template_conversations_take_hh_form(tiny_tokenizer: Any, tmp_path: Path):
    system = {"role": "system", "content": "Be kind."}
    pair = render_row({"prompt": [system, *TURNS], "chosen": GOOD, "rejected": BAD}, tiny_tokenizer, True)
    assert pair["prompt"] == "\n\nBe kind." + PROMPT, "a system message is lost or called a human's"
    nothing = [{"role": "assistant", "content": ""}]
    fitted = pairs_of(tmp_path, tiny_tokenizer, {"prompt": TURNS, "chosen": GOOD, "rejected": nothing}, HH)
    assert fitted.summary["dropped"] == {"empty completion": 1}, "an answer without a word is trained on"


def test_the_end_token_comes_back_where_the_answer_is_whole(tiny_tokenizer: Any, tmp_path: Path):
    long = [{"role": "assistant", "content": "no " * 200}]
    for template in (None, CHATML, ALTERNATING):
        tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
        pair = pairs_of(tmp_path, tokenizer, {"prompt": TURNS, "chosen": GOOD, "rejected": long}).pairs[0]
        end = tokenizer.eos_token_id
        assert pair["chosen_ids"][-1] == end and pair["chosen_ids"].count(end) == 1, "a whole answer must end, once"
        assert end not in pair["rejected_ids"], "a cut answer ends as if it were whole"
        assert len(pair["prompt_ids"] + pair["rejected_ids"]) == 128, "the cut answer does not fill the budget"
        for name in ("prompt", "chosen"):
            assert "Ġ" not in tokenizer.decode(pair[f"{name}_ids"]), "tokens do not decode to text"
    start = tokenizer.decode(pair["prompt_ids"])
    assert start == "<|start|>[INST] Hi! [/INST] Hello.<|endoftext|>[INST] How are you? [/INST]"[-len(start) :], (
        "the prompt's tokens are not the template's text"
    )


def test_special_tokens_in_plain_text_stay_text(tiny_tokenizer: Any, tmp_path: Path):
    prompt = "\n\nHuman: What is <|endoftext|>?\n\nAssistant:"
    split = pairs_of(tmp_path, tiny_tokenizer, {"chosen": prompt + " A token.", "rejected": prompt + " <|endoftext|>"})
    pair, end = split.pairs[0], tiny_tokenizer.eos_token_id
    assert end not in pair["prompt_ids"], "a question about <|endoftext|> is read as ended"
    assert pair["rejected_ids"].count(end) == 1, "an answer that names <|endoftext|> ends twice"
    assert tiny_tokenizer.decode(pair["prompt_ids"]) == prompt, "the prompt is not what the user wrote"


BROKEN = {
    "not JSON": (b'{"chosen": "a', "expected one JSON object"),
    "not an object": (b'["a", "b"]', "expected a JSON object with keys, found a list"),
    "not UTF-8": (b'{"chosen": "\xff\xfe", "rejected": "b"}', "expected UTF-8 text"),
    "nested without end": (b"[" * 100_000, "expected one JSON object"),
    "half a character": (b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "b"}', "expected valid text in 'chosen'"),
    "no rejected": ({"chosen": "a", "text": "b"}, "'rejected' is missing (keys found: 'chosen', 'text')"),
    "no keys": ({}, "'chosen' is missing (keys found: none)"),
    "number": ({**HH, "chosen": 5}, "expected 'chosen' to be a string, found 5"),
    "null": ({**HH, "rejected": None}, "expected 'rejected' to be a string, found null"),
    "null prompt": ({**HH, "prompt": None}, "expected 'prompt' to be a string, found null"),
    "no assistant turn": ({"chosen": "Hello", "rejected": "Hello you"}, "found no shared assistant turn"),
    "nothing shared": ({"chosen": PROMPT, "rejected": "x" + PROMPT}, "found no shared assistant turn"),
    "mixed forms": ({"prompt": PROMPT, "chosen": GOOD, "rejected": "Bad"}, "expected 'chosen' to be a string"),
    "number for a prompt": ({"prompt": 5, "chosen": GOOD, "rejected": BAD}, "'prompt' to be a string or a list"),
    "no messages": ({"prompt": TURNS, "chosen": [], "rejected": BAD}, "'chosen' to hold at least one message"),
    "no role": ({"prompt": [{"content": "Hi"}], "chosen": GOOD, "rejected": BAD}, "'prompt' to hold messages"),
    "odd role": ({"chosen": [{"role": ["a"], "content": "Hi"}], "rejected": BAD}, "'chosen' to hold messages"),
    "unknown role": (
        {"prompt": [{"role": "tool", "content": "Hi"}], "chosen": GOOD, "rejected": BAD},
        "expected the roles system, user, assistant",
    ),
    "no content": (
        {"chosen": GOOD, "rejected": [{"role": "assistant", "content": None}]},
        "'rejected' to hold messages",
    ),
    "no assistant message": (
        {"chosen": TURNS[:1], "rejected": TURNS[:1]},
        "share a prompt before an assistant message",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_named(kind: str, tiny_tokenizer: Any, tmp_path: Path):
    row, expected = BROKEN[kind]
    with pytest.raises(UserError) as caught:
        pairs_of(tmp_path, tiny_tokenizer, HH, b"", row, HH)
    message = str(caught.value)
    assert f"{tmp_path / 'data'}/train.jsonl row 3: " in message, "the message does not name file and row"
    assert expected in message, "the message does not say what was expected"
    assert "--on_bad_row skip" in message and "\n" not in message, "the message does not say what to do, in a sentence"


def test_broken_sft_rows_are_named(tiny_tokenizer: Any):
    for row, expected in (
        ({"prompt": PROMPT}, "expected 'completion' or 'response' beside 'prompt'"),
        ({"prompt": PROMPT, "completion": 1}, "expected 'completion' to be a string, found 1"),
        ({"text": "a"}, "expected the keys 'chosen' and 'rejected', or 'prompt' and 'completion'"),
        ({"prompt": PROMPT, "chosen": " a"}, "'rejected' is missing"),
    ):
        with pytest.raises(BrokenRow, match=expected):
            render_row(row, tiny_tokenizer, need_pairs=False)


def test_skip_drops_and_counts(tiny_tokenizer: Any, tmp_path: Path):
    rows = [HH, *(row for row, _ in BROKEN.values()), {**HH, "chosen": HH["rejected"]}, HH]
    split = pairs_of(tmp_path, tiny_tokenizer, *rows, on_bad_row="skip")
    assert split.summary["dropped"] == {"broken row": len(BROKEN), "identical completions": 1}, "drops are miscounted"
    assert (split.summary["pairs_in"], split.summary["pairs_kept"]) == (len(rows), 2), "pairs are miscounted"
    assert len(split.pairs) == len(split.texts) == 2, "a dropped pair is trained on"
    assert split.texts["prompt"][:] == [PROMPT] * 2, "texts and pairs are not the same rows"
    assert split.summary["completion_tokens_kept"] < 1, "dropped pairs do not count as lost"


def test_a_split_without_a_pair_left_is_refused(tiny_tokenizer: Any, tmp_path: Path):
    with pytest.raises(UserError, match=r"no pair of the train split is left.*identical completions"):
        pairs_of(tmp_path, tiny_tokenizer, {**HH, "chosen": HH["rejected"]})


def test_several_processes_read_the_same(tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"chosen": f"{PROMPT} a {i}", "rejected": f"{PROMPT} b {i}"} for i in range(40)]
    (tmp_path / "two").mkdir()
    (tmp_path / "broken").mkdir()
    one = pairs_of(tmp_path, tiny_tokenizer, *rows)
    monkeypatch.setattr("tinydpo.data.pairs.LARGE", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    two = pairs_of(tmp_path / "two", tiny_tokenizer, *rows)
    assert (two.pairs[:], two.summary) == (one.pairs[:], one.summary), "the result depends on the number of cores"
    with pytest.raises(UserError, match="row 2: expected one JSON object"):
        pairs_of(tmp_path / "broken", tiny_tokenizer, rows[0], b"{", *rows)


def test_another_template_or_mode_is_another_cache(tiny_tokenizer: Any):
    record = {"file": "f", "row": 1, "subset": None, "record": json.dumps(FORMS["whole conversations"]).encode()}
    records = Dataset.from_list([record], features=RECORD_FEATURES)
    tokenizers = (tiny_tokenizer, *(with_template(tiny_tokenizer, t) for t in (CHATML, ALTERNATING)))
    runs = [render_texts(records, tokenizer, True, "stop", 1) for tokenizer in tokenizers for _ in range(2)]
    assert len({run._fingerprint for run in runs}) == 3, (
        "a changed chat template is given the old texts, or none is kept"
    )
    assert len({run[0]["prompt"] for run in runs}) == 3, "the chat template has no effect"
