"""What people point `--dataset_name` at: each kind of file gives the right pairs, or one sentence that says why not.

Every kind goes the whole way that the scripts go, `load_pairs`; a few go through `scripts/sft.py` too.
"""

import bz2
import copy
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import ROOT

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError

Pair = tuple[str, str, str | None]


def pair(i: int, prompt: str = "q", chosen: str = "yes", rejected: str = "no") -> Pair:
    return f"\n\nHuman: {prompt} {i}?\n\nAssistant:", f" {chosen}", f" {rejected}"


def row(pair: Pair) -> dict[str, str]:
    """As HH writes it."""
    return {"chosen": pair[0] + pair[1], "rejected": pair[0] + pair[2]}


def lines(rows: list) -> bytes:
    return b"".join(r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows)


PAIRS = [pair(i) for i in range(4)]
ROWS = [row(p) for p in PAIRS]
GOOD = lines(ROWS)
ODD = [pair(i, "ما اسمك؟ 👩‍👩‍👧 é \u200f", "שלום 🙂", "e\u0301\u0302 \u2028 \x85") for i in range(4)]
TURNS = {
    "prompt": [{"role": "user", "content": "q 0?"}],
    "chosen": [{"role": "assistant", "content": "yes"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
BIG = "word " * 20_000
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)
SPOKEN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
CHATML = (
    "{% for m in messages %}" + SPOKEN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.jsonl", content)
    return buffer.getvalue()


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns) if columns else pa.table({}), buffer)
    return buffer.getvalue()


def twice() -> bytes:
    buffer, column = io.BytesIO(), pa.array([ROWS[0]["chosen"]] * 4)
    pq.write_table(pa.Table.from_arrays([column] * 3, names=["chosen", "chosen", "rejected"]), buffer)
    return buffer.getvalue()


def folder(**files: bytes | Callable[[Path], None]) -> Callable[[Path], Path]:
    """A folder of files (`__` for a dot), each its content or a function that makes it."""

    def write(at: Path) -> Path:
        (at / "data").mkdir()
        for name, content in files.items():
            path = at / "data" / name.replace("__", ".")
            content(path) if callable(content) else path.write_bytes(content)
        return at / "data"

    return write


def linked(name: str, to: Callable[[Path], Path | str]) -> Callable[[Path], Path]:
    def write(at: Path) -> Path:
        (at / name).symlink_to(to(at))
        return at / name

    return write


def real(at: Path) -> Path:
    (at / "real").mkdir()
    (at / "real" / "train.jsonl").write_bytes(GOOD)
    return at / "real"


def odd_name(at: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(at) + b"/caf\xe9.jsonl"))
    path.write_bytes(GOOD)
    return path


class Kind(NamedTuple):
    """`content`: what the file `name` holds, or a function that writes it and returns the path to load. `expected`:
    the pairs that come out, in any order, or a pattern of the message (`…` stands for file or folder)."""

    name: str
    content: bytes | Callable[[Path], Path]
    expected: list[Pair] | str
    options: Mapping[str, Any] = MappingProxyType({})
    dropped: Mapping[str, int] = MappingProxyType({})
    template: str | None = None


SKIP, HALF = {"on_bad_row": "skip"}, {"test_split_size": 0.5}
NO_JSON = "expected one JSON object, found"
KINDS: dict[str, Kind] = {
    # Encodings and bytes
    "UTF-16 with a byte-order mark": Kind(
        "a.jsonl", GOOD.decode().encode("utf-16"), "… is UTF-16 text; save it as UTF-8"
    ),
    "UTF-16 without": Kind("a.jsonl", GOOD.decode().encode("utf-16-be"), rf"… row \d: {NO_JSON} '\\x00{{\\x00"),
    "Latin-1": Kind(
        "a.jsonl", lines([*ROWS, lines([row(pair(4, "é"))]).decode().encode("latin-1")]), "… row 5: expected UTF-8"
    ),
    "UTF-8 with a byte-order mark": Kind("a.jsonl", b"\xef\xbb\xbf" + GOOD, PAIRS),
    "a byte-order mark in the middle": Kind("a.jsonl", lines(ROWS[:2]) + b"\xef\xbb\xbf" + lines(ROWS[2:]), PAIRS),
    "right-to-left text, emoji, combining characters, odd line separators": Kind(
        "a.jsonl", lines([row(p) for p in ODD]), ODD
    ),
    "NULs as escapes": Kind(
        "a.jsonl", lines([row(pair(i, "\0")) for i in range(4)]), [pair(i, "\0") for i in range(4)]
    ),
    "a NUL in a text": Kind(
        "a.jsonl", GOOD.replace(b"q 2", b"q \0"), f"… row 3: {NO_JSON} .*Invalid control character"
    ),
    "NULs at the end, as after a crash": Kind("a.jsonl", GOOD + b"\0" * 4096, rf"… row 5: {NO_JSON} '\\x00"),
    "a lone surrogate": Kind(
        "a.jsonl", GOOD.replace(b" 2?", b" \\ud83d?"), "… row 3: expected valid text in 'prompt', found half"
    ),
    "a lone surrogate in another key": Kind(
        "a.jsonl",
        GOOD + b'{"subset": "\\ud83d", ' + lines(ROWS[:1])[1:],
        "… row 5: expected valid text in 'subset', found half",
    ),
    "a surrogate pair as escapes": Kind("a.jsonl", "".join(json.dumps(row(p)) + "\n" for p in ODD).encode(), ODD),
    # Lines
    "no trailing newline": Kind("a.jsonl", GOOD.rstrip(), PAIRS),
    "Windows line ends": Kind("a.jsonl", GOOD.replace(b"\n", b"\r\n"), PAIRS),
    "old Mac line ends": Kind("a.jsonl", GOOD.replace(b"\n", b"\r"), "… has 1 row.*write one row a line"),
    "Windows line ends in the texts": Kind(
        "a.jsonl", GOOD.replace(b"\\n", b"\\r\\n"), r"… row \d: expected dialogues that share"
    ),
    "blank lines": Kind("a.jsonl", b"\n" + GOOD.replace(b"\n", b"\n \t\r\n") + b"\n\n", PAIRS),
    "a comma after each row": Kind("a.jsonl", GOOD.replace(b"\n", b",\n"), rf"… row \d: {NO_JSON} .*Extra data"),
    "rows joined on one line": Kind(
        "a.jsonl", GOOD + lines(ROWS[:2]).replace(b"\n", b""), f"… row 5: {NO_JSON} .*Extra data"
    ),
    "a trailing comma in a list": Kind(
        "a.json", b"[" + GOOD.strip().replace(b"\n", b",") + b",]", "… cannot be read.*JSON list"
    ),
    "a row spread over lines": Kind("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), rf"… row \d: {NO_JSON}"),
    # Other things under the name of rows
    "an empty file": Kind("a.jsonl", b"", "…: no rows"),
    "an empty gzip file": Kind("a.jsonl.gz", gzip.compress(b""), "…: no rows"),
    "an empty list": Kind("a.json", b"[]", "…: no rows"),
    "a Git LFS pointer": Kind("a.jsonl", POINTER, "… is a Git LFS pointer in place of the data; .*git lfs pull"),
    "a Git LFS pointer for Parquet": Kind("a.parquet", POINTER, "… is a Git LFS pointer"),
    "an HTML error page": Kind(
        "a.jsonl", b"<!DOCTYPE html>\n<html>\n<p>Not found\n</html>\n", rf"… row \d: {NO_JSON} '<"
    ),
    "CSV": Kind("a.jsonl", b"chosen,rejected\nyes,no\n", rf"… row \d: {NO_JSON} '(chosen,rejected|yes,no)'"),
    "CSV by its name": Kind("a.csv", b"chosen,rejected\nyes,no\n", "… is not a .jsonl"),
    "gzip without .gz": Kind("a.jsonl", gzip.compress(GOOD), PAIRS),
    ".gz without gzip": Kind("a.jsonl.gz", GOOD, PAIRS),
    "gzip cut short": Kind(
        "a.jsonl.gz", gzip.compress(lines([row(pair(i)) for i in range(999)]))[:-300], "… cannot be read.*cut"
    ),
    "gzip twice": Kind(
        "a.jsonl.gz", gzip.compress(gzip.compress(GOOD) + b"\n" + GOOD), r"… row \d+: expected UTF-8 text"
    ),
    "zstd as .gz": Kind("a.jsonl.gz", b"\x28\xb5\x2f\xfd" + bytes(60), "… is compressed with zstd; unpack it"),
    "zip as .gz": Kind("a.jsonl.gz", zipped(GOOD), "… is a zip archive; unpack it"),
    "bzip2 as .gz": Kind("a.jsonl.gz", bz2.compress(GOOD), "… is compressed with bzip2; unpack it"),
    "xz as .jsonl": Kind("a.jsonl", lzma.compress(GOOD), "… is compressed with xz; unpack it"),
    "Parquet as .jsonl": Kind(
        "a.jsonl", parquet(chosen=[r["chosen"] for r in ROWS], rejected=[r["rejected"] for r in ROWS]), PAIRS
    ),
    "rows as .parquet": Kind("a.parquet", GOOD, "… cannot be read, it may be cut or damaged"),
    "Parquet without the columns": Kind(
        "a.parquet", parquet(text=["a", "b"]), r"… row \d: .*'chosen' is missing .*'text'"
    ),
    "Parquet without any": Kind("a.parquet", parquet(), "…: no rows"),
    "Parquet of numbers": Kind(
        "a.parquet", parquet(chosen=[1, 2], rejected=[3, 4]), r"… row \d: expected 'chosen' .* found [12]"
    ),
    "Parquet with a column twice": Kind("a.parquet", twice(), "… cannot be read.*two columns 'chosen'"),
    "Parquet with an impossible date": Kind(
        "a.parquet", parquet(at=pa.array([2**62] * 4, pa.timestamp("us"))), "… cannot be read.*out of range"
    ),
    "Parquet with text that is none": Kind(
        "a.parquet", parquet(chosen=pa.array([b"\xff", b"b"]).view(pa.string())), "… cannot be read.*utf-8"
    ),
    # Keys and types
    "a key twice": Kind(
        "a.jsonl", GOOD + b'{"chosen": "x", ' + lines(ROWS[:1])[1:], "… row 5: .*'chosen' stands there twice"
    ),
    "a key twice in a list": Kind(
        "a.json", b'[{"chosen": "x", "chosen": "y"}]', "… cannot be read.*'chosen' stands there twice"
    ),
    "keys in another order": Kind("a.jsonl", lines([dict(reversed(r.items())) for r in ROWS]), PAIRS),
    "keys in capitals": Kind(
        "a.jsonl", lines([{"Chosen": "a", "Rejected": "b"}] * 2), r"… row \d: .*'chosen' is missing .*'Chosen'"
    ),
    "chosen and rejected the same": Kind(
        "a.jsonl",
        lines([*ROWS, {**ROWS[0], "rejected": ROWS[0]["chosen"]}]),
        PAIRS,
        HALF,
        {"identical completions": 1},
    ),
    "prompt and answers swapped": Kind(
        "a.jsonl",
        lines([{"prompt": TURNS["chosen"], "chosen": TURNS["prompt"], "rejected": TURNS["rejected"]}] * 2),
        r"… row \d: expected conversations that share a prompt",
    ),
    "a number for a text": Kind("a.jsonl", lines([*ROWS, {**ROWS[0], "chosen": 5}]), "… row 5: .*a string, found 5"),
    "true for a text": Kind(
        "a.jsonl", lines([*ROWS, {**ROWS[0], "rejected": True}]), "… row 5: .*a string, found True"
    ),
    "null for a text": Kind(
        "a.jsonl", lines([*ROWS, {**ROWS[0], "rejected": None}]), "… row 5: .*a string, found null"
    ),
    "NaN for a text": Kind(
        "a.jsonl", lines([*ROWS, {**ROWS[0], "chosen": float("nan")}]), "… row 5: .*a string, found nan"
    ),
    "NaN in a key that is not read": Kind("a.jsonl", lines([{**r, "score": float("nan")} for r in ROWS]), PAIRS),
    "a number without end": Kind("a.jsonl", GOOD + b'{"chosen": ' + b"9" * 5000 + b"}\n", f"… row 5: {NO_JSON}"),
    "an object for a text": Kind(
        "a.jsonl", lines([*ROWS, {**ROWS[0], "chosen": {"text": "a"}}]), "… row 5: .* found an object"
    ),
    "a row that is a list": Kind(
        "a.jsonl", lines([*ROWS, ["a", "b"]]), "… row 5: expected a JSON object with keys, found a list"
    ),
    "a row that is a text": Kind(
        "a.jsonl", lines([*ROWS, "a"]), "… row 5: expected a JSON object with keys, found a string"
    ),
    "nested without end": Kind("a.jsonl", GOOD + b'{"chosen": ' + b"[" * 100_000 + b"\n", f"… row 5: {NO_JSON}"),
    "nested deep in a key that is not read": Kind(
        "a.jsonl", GOOD.replace(b"}", b', "x": ' + b"[" * 500 + b"]" * 500 + b"}"), PAIRS
    ),
    "HH dialogues beside conversations": Kind("a.jsonl", lines([TURNS, *ROWS[1:]]), PAIRS),
    "texts beside conversations in one row": Kind(
        "a.jsonl",
        lines([*ROWS, {**TURNS, "rejected": "no"}]),
        "… row 5: expected 'prompt' to be a string, found a list",
    ),
    "SFT rows where pairs are needed": Kind(
        "a.jsonl", lines([{"prompt": "p", "completion": "c"}] * 2), r"… row \d: .*'chosen' is missing"
    ),
    "messages without the last answer": Kind(
        "a.jsonl",
        lines([TURNS, {**TURNS, "chosen": [*TURNS["chosen"], *TURNS["prompt"]]}]),
        "… row 2: expected 'chosen' to end in an assistant message, found one by 'user'",
        template=CHATML,
    ),
    "a role that nobody knows": Kind(
        "a.jsonl",
        lines([TURNS, {**TURNS, "prompt": [{"role": "Human", "content": "q 0?"}]}]),
        "… row 2: .* found 'Human'; --role says which one it is, for example --role Human=user",
        template=CHATML,
    ),
    "roles under other names": Kind(
        "a.jsonl",
        lines([{**row, "prompt": [{"role": "Human", "content": f"q {i}?"}]} for i, row in enumerate([TURNS] * 4)]),
        PAIRS,
        {"role": ["Human=user"]},
    ),
    "a system text without a template": Kind(
        "a.jsonl",
        lines([{**r, "system": ""} for r in ROWS] + [{**ROWS[0], "system": "Be brief."}]),
        "… row 5: expected messages beside 'system', found texts in HH's form; write messages",
    ),
    "Alpaca's columns": Kind(
        "a.jsonl",
        lines([{"instruction": "q", "input": "", "output": "yes"}] * 2),
        r"… row \d: .*keys found: 'instruction', 'input', 'output'\); --column says what is what",
    ),
    "Orca's columns": Kind(
        "a.jsonl",
        lines([{"question": "q", "chosen": "yes", "rejected": "no"}] * 2),
        r"… row \d: expected dialogues that share .* for example --column question=prompt",
    ),
    "columns under other names": Kind(
        "a.jsonl",
        lines([{"good": r["chosen"], "bad": r["rejected"]} for r in ROWS]),
        PAIRS,
        {"column": ["good=chosen", "bad=rejected"]},
    ),
    "two columns for one name": Kind(
        "a.jsonl",
        lines([*ROWS, {**ROWS[0], "good": "yes"}]),
        "… row 5: expected one column for 'chosen', found two",
        {"column": ["good=chosen"]},
    ),
    "OpenAI's form without an answer": Kind(
        "a.jsonl",
        lines([{"input": {"messages": TURNS["prompt"]}, "preferred_output": TURNS["chosen"]}] * 2),
        r"… row \d: .*'rejected' is missing",
    ),
    # What texts hold
    "an empty answer": Kind(
        "a.jsonl",
        lines([*ROWS, row(pair(4))]).replace(b"4?\\n\\nAssistant: no", b"4?\\n\\nAssistant:"),
        PAIRS,
        HALF,
        {"empty completion": 1},
    ),
    "answers of white space": Kind(  # an answer like any other: some of HH's are preferred to words, or not
        "a.jsonl", lines([*ROWS, row(pair(4, rejected="\n"))]), [*PAIRS, pair(4, rejected="\n")]
    ),
    "the end token in prompt and answer": Kind(
        "a.jsonl",
        lines([row(pair(i, "<|endoftext|>", "<|endoftext|> ends")) for i in range(4)]),
        [pair(i, "<|endoftext|>", "<|endoftext|> ends") for i in range(4)],
    ),
    "the end token in a message": Kind(
        "a.jsonl",
        lines([TURNS, {**TURNS, "prompt": [{"role": "user", "content": "<|im_end|>"}]}]),
        "… row 2: expected messages without the model's special token '<|im_end|>'",
        template=CHATML,
    ),
    "20,000 words in an answer": Kind(
        "a.jsonl", lines([*ROWS, row(pair(4, chosen=BIG))]), [*PAIRS, pair(4, chosen=BIG)]
    ),
    "10 MB in a key that is not read": Kind(
        "a.jsonl", lines([*ROWS[1:], {**ROWS[0], "html": "x" * 10_000_000}]), PAIRS
    ),
    "one bad row among thousands": Kind(
        "a.jsonl",
        lines([row(pair(i)) for i in range(2345)]) + b"{\n" + lines([row(pair(i)) for i in range(654)]),
        f"… row 2346: {NO_JSON} '{{' ",
    ),
    "bad rows that are skipped": Kind(
        "a.jsonl",
        lines([b"{\n", *ROWS[:2], b"\xff\n", {"chosen": 1}, *ROWS[2:]]),
        PAIRS,
        {**SKIP, **HALF},
        {"broken row": 3},
    ),
    "nothing but bad rows, skipped": Kind(
        "a.jsonl", b"{\n" * 5, "…: no pair of the train split is left.*'broken row': 4", SKIP
    ),
    "one row": Kind("a.jsonl", lines(ROWS[:1]), r"… has 1 row\(s\), too few to hold out .*add rows or a test split"),
    # Files and folders
    "a link to a file": Kind("", linked("a.jsonl", lambda at: real(at) / "train.jsonl"), PAIRS),
    "a link to a folder": Kind("", linked("a", real), PAIRS),
    "a link to nothing": Kind(
        "", linked("a.jsonl", lambda at: "nothing"), "there is no file or folder '…'; check --dataset_name"
    ),
    "a link to itself": Kind("", linked("a.jsonl", lambda at: "a.jsonl"), "there is no file or folder '…'"),
    "a link to nothing in a folder": Kind(
        "",
        folder(train__jsonl=GOOD, test__jsonl=lambda path: path.symlink_to("nothing")),
        "…/test.jsonl links to a file that is not",
    ),
    "a file that fails when read": Kind(
        "", linked("a.jsonl", lambda at: "/proc/self/mem"), "… cannot be read .*check the file"
    ),
    "a name that is not UTF-8": Kind("", odd_name, PAIRS),
    "a name too long": Kind("", lambda at: at / ("x" * 300 + ".jsonl"), "cannot be read .*check --dataset_name"),
    "a folder of nothing but a README": Kind(
        "", folder(README__md=b"# Pairs\n"), "… is not a dataset that can be read"
    ),
    "a README that is no YAML": Kind(
        "", folder(README__md=b"---\nconfigs: [a\n---\n", train__jsonl=GOOD), "(?s)… is not a dataset .*README.md"
    ),
    "a README of several configurations": Kind(
        "",
        folder(
            README__md=b"---\nconfigs:\n"
            + b"".join(b"- config_name: %s\n  data_files: a.jsonl\n" % name for name in (b"a", b"b"))
            + b"---\n",
            a__jsonl=GOOD,
        ),
        r"(?s)… is not a dataset .*\['a', 'b'\].*--dataset_config",
    ),
    "a split that is not there": Kind(
        "",
        folder(train__jsonl=GOOD),
        "… has no split 'dev', only train; check --dataset_train_split",
        {"dataset_train_split": "dev"},
    ),
    "splits of different columns": Kind(
        "",
        folder(train__jsonl=GOOD, test__jsonl=lines([{"prompt": "p", "completion": "c"}])),
        "…/test.jsonl row 1: .*'chosen' is missing",
    ),
    "splits of different formats": Kind(
        "", folder(train__jsonl=GOOD, test__parquet=parquet(chosen=["a"])), "… is not a dataset .*format"
    ),
    "JSON lines and Parquet in one split": Kind(
        "",
        folder(
            train_1__jsonl=lines(ROWS[:2]),
            train_2__parquet=parquet(
                chosen=[r["chosen"] for r in ROWS[2:]], rejected=[r["rejected"] for r in ROWS[2:]]
            ),
        ),
        "…/train_1.jsonl would not be read",
    ),
    "notes and a Mac's hidden files beside the data": Kind(
        "", folder(train__jsonl=GOOD, notes__txt=b"hi", __DS_Store=b"\0"), PAIRS
    ),
}


def templated(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def outcome(kind: Kind, at: Path, tokenizer: Any) -> tuple[list[Pair], dict[str, int], list[dict]]:
    """Pairs (texts), counts of what was dropped, and pairs (tokens) of both splits."""
    if kind.template:
        tokenizer = templated(tokenizer, kind.template)
    splits = load_pairs(DataArguments(dataset_name=str(at), **kind.options), tokenizer, 128).values()
    dropped: dict[str, int] = {}
    for reason, count in (item for split in splits for item in split.summary["dropped"].items()):
        dropped[reason] = dropped.get(reason, 0) + count
    texts = [(text["prompt"], text["chosen"], text["rejected"]) for split in splits for text in split.texts]
    return texts, dropped, [fitted for split in splits for fitted in split.pairs]


def written(kind: Kind, at: Path) -> Path:
    if callable(kind.content):
        return kind.content(at)
    (at / kind.name).write_bytes(kind.content)
    return at / kind.name


@pytest.mark.parametrize("name", KINDS)
def test_right_pairs_or_one_sentence(name: str, tmp_path: Path, tiny_tokenizer: Any):
    kind = KINDS[name]
    path = written(kind, tmp_path)
    if isinstance(kind.expected, list):
        texts, dropped, fitted = outcome(kind, path, tiny_tokenizer)
        assert sorted(texts) == sorted(kind.expected), f"{name}: pairs are lost or changed"
        assert dropped == kind.dropped, f"{name}: pairs are dropped unsaid"
        end = tiny_tokenizer.eos_token_id
        for pair in fitted:
            assert end not in pair["prompt_ids"] + pair["chosen_ids"][:-1], f"{name}: a text ends in its middle"
        return
    pattern = kind.expected.replace("…", "PATH")
    with pytest.raises(UserError) as caught:
        outcome(kind, path, tiny_tokenizer)
    told = str(caught.value).replace(str(path), "PATH")
    assert re.search(pattern, told), f"{name}: the message is {told!r}"


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """Root may read everything: drop to the user `nobody` for the test."""
    if os.geteuid():
        yield
        return
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_file_or_folder_without_permission(tmp_path: Path, tiny_tokenizer: Any, request: pytest.FixtureRequest):
    (tmp_path / "closed").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "closed" / "a.jsonl"):
        path.write_bytes(GOOD)
        path.chmod(0)
    (tmp_path / "closed").chmod(0)
    request.getfixturevalue("unprivileged")
    for path in (tmp_path / "a.jsonl", tmp_path / "closed" / "a.jsonl"):
        with pytest.raises(UserError, match=f"{path} cannot be read .Permission denied.; check"):
            load_pairs(DataArguments(dataset_name=str(path)), tiny_tokenizer, 128)


def result_or_sentence(path: Path, tokenizer: Any) -> None:
    """Either pairs or one `UserError`; what else comes out fails the test."""
    for on_bad_row in ("stop", "skip"):
        try:
            load_pairs(DataArguments(dataset_name=str(path), on_bad_row=on_bad_row), tokenizer, 128)
        except UserError as error:
            assert str(path) in str(error), f"the message does not name the file: {error}"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "a"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "\ud800"]), "content": anything},
        optional={"tool_calls": anything},
    ),
    max_size=3,
)
keys = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "completion", "subset", "messages", "system", "tools", "input"]),
    anything | messages,
    max_size=5,
)
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(st.binary(max_size=60) | st.binary(max_size=20).map(lambda part: GOOD[:200] + part + GOOD[200:]))
def test_any_bytes(tmp_path: Path, tiny_tokenizer: Any, content: bytes):
    (tmp_path / "a.jsonl").write_bytes(content)
    result_or_sentence(tmp_path / "a.jsonl", tiny_tokenizer)


@few
@given(st.lists(anything | keys, min_size=1, max_size=4))
def test_any_rows(tmp_path: Path, tiny_tokenizer: Any, rows: list):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + GOOD.decode())
    result_or_sentence(tmp_path / "a.jsonl", tiny_tokenizer)


@few
@given(st.lists(keys, min_size=1, max_size=4))
def test_any_rows_with_a_template(tmp_path: Path, tiny_tokenizer: Any, rows: list):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + GOOD.decode())
    result_or_sentence(tmp_path / "a.jsonl", templated(tiny_tokenizer, CHATML))


def test_training_on_bad_data_ends_before_it_begins(tmp_path: Path, tiny_model: Path):
    """The process that a user starts: exit code 1, the sentence and nothing else on stderr, no folder left."""
    (tmp_path / "a.jsonl").write_bytes(POINTER)
    out = tmp_path / "out"
    command = [sys.executable, "scripts/sft.py", "--config", "recipes/quickstart/sft.yaml"]
    command += ["--model_name_or_path", str(tiny_model), "--dataset_name", str(tmp_path / "a.jsonl")]
    command += ["--output_dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, f"it exits with {done.returncode}"
    assert done.stderr.startswith(f"error: {tmp_path}/a.jsonl is a Git LFS pointer"), done.stderr
    assert done.stderr.count("\n") == 1, f"more than one sentence: {done.stderr}"
    assert not out.exists(), "a run that never began left a folder behind"
