"""Where rows come from: the Hub, a local folder or one file, each split read once into Arrow on disk.

A split's files are those that `datasets` takes. They are read here, row by row, so that a broken row can be named by
file and row number, and rows of one file may have different forms. Without a test split, whole prompts are held out.
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet
from datasets import (
    Dataset,
    Features,
    Value,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset_builder,
)
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from tinydpo.config.arguments import DataArguments, Source, get_split_name, parse_renames, parse_slice
from tinydpo.data import CACHE_VERSION
from tinydpo.data.rows import BrokenRow, decode_row, read_row
from tinydpo.errors import UserError, escape_controls, get_rank
from tinydpo.models.hub import download_dataset

ROW_FEATURES = Features(
    {
        "file": Value("string"),
        "row": Value("int64"),  # from 1; of a JSON-lines file the line
        "subset": Value("string"),  # the row's own, or the folder of a dataset that has several, or null
        "parsed": Value("string"),  # a `ParsedRow` as JSON; null for a broken row
        "prompt_hash": Value("int64"),
        "broken": Value("string"),  # what is wrong with a broken row, else null
    }
)
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
NO_ROWS = {*FILES_TO_IGNORE, "pairs_results.json"}  # the latter lies beside on-policy pairs
SMALL_BYTES = 8 << 20  # files below this are read without a progress bar
HOLD_OUT_SEED = 42  # not the run's seed: SFT, DPO and evaluation must draw and hold out the same rows


class DataFile(NamedTuple):
    """A file of rows, its name in messages, and the subset of its rows ("" for none)."""

    path: str
    name: str
    subset: str


def load_rows(data: DataArguments) -> dict[str, Dataset]:
    """Read the `train` and the `test` rows of all datasets, one after the other (columns of `ROW_FEATURES`)."""
    if not data.dataset_name:
        raise UserError("dataset_name is not set; give a Hub id, a folder or a file, such as --dataset_name my.jsonl")
    sources = data.sources()
    train = []
    test = []
    for source, label in zip(sources, _label_sources(sources), strict=True):
        source_train, source_test = _load_source(data, source, label)
        train.append(draw_rows(source_train, round(source.weight * len(source_train))))
        test.append(source_test)
    return {"train": concatenate_datasets(train), "test": concatenate_datasets(test)}


def _label_sources(sources: list[Source]) -> list[str]:
    """A name for each of several datasets, as short as tells them apart; "" for a single one."""
    if len(sources) == 1:
        return [""]
    short = [Path(source.data_dir or source.name).name.split(".")[0] for source in sources]
    full = ["/".join(filter(None, (source.name.rstrip("/"), source.config, source.data_dir))) for source in sources]
    return short if len(set(short)) == len(short) else full


def draw_rows(rows: Dataset, count: int) -> Dataset:
    """Draw `count` rows, but at least one, and keep their order. The choice depends on the two numbers alone."""
    if count >= len(rows):
        return rows
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(rows))
    return rows.select(np.sort(order[: max(1, count)]))


def count_shared_prompts(train: Dataset, test: Dataset) -> int:
    """How many rows of `test` have a `prompt` that is one of `train`'s; both with columns of `text.TEXT_FEATURES`."""
    trained = set()  # hashes: the prompts themselves may be gigabytes
    for batch in train.select_columns("prompt").iter(1_000):
        trained.update(map(hash, batch["prompt"]))
    return sum(hash(prompt) in trained for prompt in test["prompt"][:])


def _load_source(data: DataArguments, source: Source, label: str) -> tuple[Dataset, Dataset]:
    """The train and the test rows of one dataset."""
    train = data.train_split_name
    test = data.dataset_test_split
    files = _find_files(data, source, label)
    for split, flag in ((train, "--dataset_train_split"), (test, "--dataset_test_split")):
        may_be_missing = split == test == "test"  # the default: nobody asked for it by name
        if split not in files and not may_be_missing:
            raise UserError(f"{source.name} has no split {split!r}, only {', '.join(sorted(files))}; check {flag}")
    columns = parse_renames(data.column)
    roles = parse_renames(data.role)
    rows = _read_files(files[train], columns, roles)
    if data.dataset_train_split != train:
        rows = _take_slice(rows, data.dataset_train_split)
    if test in files:
        return rows, _read_files(files[test], columns, roles)
    return hold_out(rows, data.test_split_size, source.name)


def _take_slice(rows: Dataset, split: str) -> Dataset:
    """Take the rows that a slice such as `train[:25%]` names, as `datasets` slices a split, but from each file.

    So every subset is in the slice: HH's are files, one after the other.
    """
    name = get_split_name(split)
    instruction = parse_slice(split)
    kept: list[int] = []
    start = 0
    counts = pc.value_counts(rows.with_format("arrow")["file"][:]).field("counts")  # files in order of appearance
    for count in counts.to_pylist():
        (part,) = instruction.to_absolute({name: count})
        kept.extend(range(start + part.from_, start + part.to))
        start += count
    if not kept:
        raise UserError(f"{split} has none of the {len(rows):,} rows of {name}; name another slice")
    return rows.select(kept)


def _find_files(data: DataArguments, source: Source, label: str) -> dict[str, list[DataFile]]:
    """Every split's files; a single file is the `train` split. `label` goes before the subset of their rows."""
    path = Path(source.name).expanduser()
    if path.is_file():
        return {data.train_split_name: [DataFile(str(path), str(path), label)]}
    if not path.is_dir():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.name) or path.name.endswith(FILE_SUFFIXES):
            raise UserError(f"there is no file or folder {source.name!r}; check --dataset_name")
        path = download_dataset(source.name, source.revision, source.data_dir, FILE_SUFFIXES)
    root = path / (source.data_dir or "")
    if not root.is_dir():
        raise UserError(f"{source.name} has no folder {source.data_dir!r}; check --dataset_data_dir")
    if set("*?[") & set(str(root)):
        raise UserError(f"{root}: `datasets` takes *, ? and [ in a folder's name for a pattern; rename it")
    splits = _split_files(path, root, source)
    read = {name for split in (data.train_split_name, data.dataset_test_split) for name in splits.get(split, ())}
    found = (file.relative_to(root).as_posix() for file in sorted(root.rglob("[!._]*")) if file.name not in NO_ROWS)
    unread = [name for name in found if name.endswith(FILE_SUFFIXES) and name not in read]
    if unread and not get_rank():
        shown = escape_controls(", ".join(unread[:5])) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
        print(f"Data: files of {source.name} that are in neither split are not read: {shown}")
    return _add_subsets(root, source, label, splits)


def _split_files(folder: Path, root: Path, source: Source) -> dict[str, list[str]]:
    """Which files below `root` are each split's, as `datasets` finds them by their names and the folder's README."""
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # it warns of a README without metadata
    try:
        builder = load_dataset_builder(str(folder.absolute()), name=source.config, data_dir=source.data_dir)
    except Exception as error:  # the metadata of a README can be anything, and so can the error
        if getattr(error, "filename", None):
            raise  # the cache's folder cannot be made
        reason = str(error).partition("\nExample of usage")[0]
        raise UserError(
            f"{source.name} is not a dataset that can be read: {reason}; check its files, its README.md, "
            "--dataset_config and --dataset_data_dir"
        ) from None
    splits: dict[str, list[str]] = {}
    for split, files in builder.config.data_files.items():
        splits[str(split)] = []
        for file in map(os.path.normpath, sorted(files)):
            if not Path(file).is_relative_to(root.resolve()):
                raise UserError(f"{source.name}: its README.md names {file}, outside the folder; correct it")
            splits[str(split)].append(Path(file).relative_to(root.resolve()).as_posix())
    return splits


def _add_subsets(root: Path, source: Source, label: str, splits: dict[str, list[str]]) -> dict[str, list[DataFile]]:
    # Folders are subsets if one split has several of them; folders that only separate train from test are not.
    folders = [{Path(name).parent for name in names} for names in splits.values()]
    has_subsets = bool(source.data_dir) or max(map(len, folders)) > 1

    def describe(name: str) -> DataFile:
        inside = Path(source.data_dir or "", name)
        subset = inside.parent.as_posix() if has_subsets and inside.parent != Path() else ""
        if label:
            subset = f"{label}/{subset.removeprefix(source.data_dir or '').strip('/')}".rstrip("/")
        return DataFile(str(root / name), f"{source.name.rstrip('/')}/{inside.as_posix()}", subset)

    return {split: [describe(name) for name in names] for split, names in splits.items()}


def _read_files(files: list[DataFile], columns: Mapping[str, str], roles: Mapping[str, str]) -> Dataset:
    """Read files into Arrow, once: the cache key is their content, not their date."""
    key: list[Any] = [CACHE_VERSION, sorted(columns.items()), sorted(roles.items())]
    for file in files:
        if not file.name.endswith(FILE_SUFFIXES):
            raise UserError(f"{file.name} is not a .jsonl, .jsonl.gz, .json, .json.gz, .csv or .parquet file")
        with open(file.path, "rb") as stream:
            key.append((file.name, file.subset, hashlib.file_digest(stream, "sha256").hexdigest()))
    try:
        with hide_progress_bars(small=sum(Path(file.path).stat().st_size for file in files) < SMALL_BYTES):
            return Dataset.from_generator(
                _iter_rows,
                features=ROW_FEATURES,
                gen_kwargs={"files": tuple(files), "columns": columns, "roles": roles},
                fingerprint=Hasher.hash(key),
            )
    except DatasetGenerationError as error:  # its cause names the file
        raise error.__cause__ or error from None
    except ValueError as error:  # raised by `datasets` for a generator without rows
        raise UserError(f"{', '.join(file.name for file in files)}: no rows ({error})") from None


def _iter_rows(
    files: tuple[DataFile, ...], columns: Mapping[str, str], roles: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Parse the rows of files; a broken row is kept, with what is wrong in `broken`."""
    for file in files:
        for number, record in _iter_records(file):
            row = {"file": file.name, "row": number, "subset": file.subset or None, "parsed": None, "broken": None}
            prompt: Any = (file.name, number)  # a broken row counts as a prompt of its own
            try:
                parsed = read_row(decode_row(record), columns, roles)
                prompt = (parsed.system, parsed.prompt)
                row["parsed"] = parsed.to_json()
                if parsed.subset is not None:
                    row["subset"] = parsed.subset
            except BrokenRow as error:
                row["broken"] = str(error)
            digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()
            row["prompt_hash"] = int.from_bytes(digest, "big", signed=True)
            yield row


def _iter_records(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The rows of a file as JSON, each with its number."""
    open_file = gzip.open if file.name.endswith(".gz") else open
    try:
        with open_file(file.path, "rb") as stream:
            if file.name.endswith(".parquet"):
                yield from _iter_parquet(stream)
            elif file.name.endswith(".csv"):
                yield from _iter_csv(stream)
            else:
                yield from _iter_json(stream, is_jsonl=".jsonl" in Path(file.name).suffixes)
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise UserError(
            f"{file.name} cannot be read, it may be cut or damaged ({error}); download or write it again"
        ) from None


def _iter_parquet(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(1_000):
        for row in batch.to_pylist():
            number += 1
            row = {field.name: _restore_value(row[field.name], field.type) for field in batch.schema}
            yield number, json.dumps(row, default=str).encode()  # dates and the like are not read anyway


def _iter_csv(stream: Any) -> Iterator[tuple[int, bytes]]:
    # Not by pandas: "NA" and "12" are texts, and a row that has a cell too many keeps its columns.
    csv.field_size_limit(2**31 - 1)  # the default would refuse a long dialogue
    rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    for number, row in enumerate(rows, 1):
        yield number, json.dumps(row).encode()


def _restore_value(value: Any, arrow_type: pyarrow.DataType) -> Any:
    """A value as it was before Parquet, which gives every struct all keys, and keeps Json features as text."""
    if value is None:
        return None
    if isinstance(value, bytes):  # binary columns may contain text
        return value.decode(errors="surrogateescape")
    if isinstance(arrow_type, pyarrow.JsonType):
        return json.loads(value)
    if pyarrow.types.is_struct(arrow_type):
        fields = [field for field in arrow_type if value[field.name] is not None]
        return {field.name: _restore_value(value[field.name], field.type) for field in fields}
    if pyarrow.types.is_list(arrow_type) or pyarrow.types.is_large_list(arrow_type):
        return [_restore_value(item, arrow_type.value_type) for item in value]
    return value


def _iter_json(stream: Any, is_jsonl: bool) -> Iterator[tuple[int, bytes]]:
    """Rows of a JSON-lines file, or of a JSON file, which may be one array instead."""
    records: Iterable[bytes] = stream
    if not is_jsonl and stream.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # with a byte-order mark
        records = (json.dumps(row).encode() for row in json.load(stream))
    for number, record in enumerate(records, 1):
        if record.strip():
            yield number, record


def hold_out(rows: Dataset, size: float, name: str) -> tuple[Dataset, Dataset]:
    """Split rows into train and held-out ones: whole prompts, the same ones for the same data.

    As many prompts are held out as fit into the share `size` of all rows, but at least one. Data with a single prompt
    are split by rows.
    """
    wanted = int(np.ceil(size * len(rows)))
    if not 0 < wanted < len(rows):
        raise UserError(
            f"{name} has {len(rows)} row(s), too few to hold out a share of {size}; write one row per line, add "
            "rows or a test split"
        )
    hashes = rows.with_format("numpy")["prompt_hash"][:]  # this column alone: the rows may be gigabytes
    prompts, sizes = np.unique(hashes, return_inverse=True, return_counts=True)[1:]
    if len(sizes) == 1:
        prompts = np.arange(len(rows))
        sizes = np.ones_like(prompts)
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(rows))
    drawn = list(dict.fromkeys(prompts[order].tolist()))  # prompts in the order of their first row
    held_out = []
    room = wanted
    for prompt in drawn:
        if sizes[prompt] <= room:
            held_out.append(prompt)
            room -= sizes[prompt]
    if not held_out:
        held_out = [min(drawn, key=lambda prompt: sizes[prompt])]
    is_held_out = np.isin(prompts[order], held_out)
    return rows.select(order[~is_held_out]), rows.select(order[is_held_out])


@contextmanager
def hide_progress_bars(small: bool) -> Iterator[None]:
    """Hide progress bars where the work is small: a bar that finishes at once only clutters the log."""
    were_hidden = are_progress_bars_disabled()
    if small:
        disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            enable_progress_bars()
