"""Where rows come from: the Hub, a local folder, or one file. One record (JSON bytes) a row, with its file and number.

Records stay undecoded until `dialogues` reads them, so that a broken one can be named by file and row; they lie in
Arrow on disk, so that memory stays flat. Splits, configurations and file patterns are resolved by `datasets`.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.fingerprint import Hasher

from tinydpo.arguments import DataArguments
from tinydpo.errors import UserError
from tinydpo.hub import download_dataset

HOLD_OUT_SEED = 42  # not the run's seed: SFT, DPO and evaluation must hold out the same rows
RECORDS = Features(
    {"file": Value("string"), "row": Value("int64"), "subset": Value("string"), "record": Value("binary")}
)
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SMALL = 8 << 20  # bytes of files read without a progress bar
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte-order mark included, which `json` reads over


def load_records(data: DataArguments) -> DatasetDict:
    """Read the train and the held-out records.

    Returns:
        A `DatasetDict` with keys `train` and `test`; columns `file`, `row` (from 1), `subset` (the folder of a dataset
        that has several, else null) and `record` (JSON, undecoded).

    Raises:
        UserError: if the data cannot be found, read, or lacks the split asked for.
    """
    if not data.dataset_name:
        raise UserError(
            "dataset_name is not set; give a Hub id, a folder or a file, for example --dataset_name my.jsonl"
        )
    train, test = data.dataset_train_split, data.dataset_test_split
    splits = _split_files(data)
    for split in (train, test):
        may_lack = split == test == "test"  # the default, so nobody asked for it by name
        if split not in splits and not may_lack:
            raise UserError(
                f"{data.dataset_name} has no split {split!r}, only {', '.join(sorted(splits))}; "
                f"check --dataset_{'test' if split == test else 'train'}_split"
            )
    if test in splits:
        return DatasetDict({"train": _read(splits[train]), "test": _read(splits[test])})
    records = _read(splits[train])
    try:
        return records.train_test_split(test_size=data.test_split_size, seed=HOLD_OUT_SEED)
    except ValueError:  # one side would be empty
        raise UserError(
            f"{data.dataset_name} has {len(records)} row(s), too few to hold out a share of {data.test_split_size}; "
            "add rows or a test split"
        ) from None


def _split_files(data: DataArguments) -> dict[str, list[dict[str, str]]]:
    path = Path(data.dataset_name).expanduser()
    if path.is_file():
        if not path.name.endswith(FILE_SUFFIXES):
            raise UserError(f"{path} is not a .jsonl, .jsonl.gz, .json or .parquet file")
        return {data.dataset_train_split: [{"path": str(path), "name": str(path), "subset": ""}]}
    if path.is_dir():
        return _folder_files(path, data)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", data.dataset_name) or path.name.endswith(FILE_SUFFIXES):
        raise UserError(f"there is no file or folder {data.dataset_name!r}; check --dataset_name")
    folder = download_dataset(data.dataset_name, data.dataset_revision, data.dataset_data_dir)
    return _folder_files(folder, data)


def _folder_files(folder: Path, data: DataArguments) -> dict[str, list[dict[str, str]]]:
    """Every split's files, as `datasets` resolves them from the folder's names and its README."""
    if data.dataset_data_dir and not (folder / data.dataset_data_dir).is_dir():
        raise UserError(f"{data.dataset_name} has no folder {data.dataset_data_dir!r}; check --dataset_data_dir")
    try:
        builder = load_dataset_builder(str(folder), name=data.dataset_config, data_dir=data.dataset_data_dir)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{data.dataset_name} is not a dataset that can be read: {error}") from None
    root, splits, data_files = folder.resolve(), {}, builder.config.data_files
    # Counted within a split: folders that only tell train from test are no subsets.
    several = any(len({Path(file).parent for file in files}) > 1 for files in data_files.values())
    for split, files in data_files.items():
        for file in sorted(files):
            inside = Path(file).relative_to(root) if Path(file).is_relative_to(root) else Path(Path(file).name)
            if not inside.name.endswith(FILE_SUFFIXES):
                raise UserError(f"{data.dataset_name}: {inside} is not a .jsonl, .jsonl.gz, .json or .parquet file")
            subset = inside.parent.as_posix() if several or data.dataset_data_dir else "."
            name = f"{data.dataset_name.rstrip('/')}/{inside.as_posix()}"
            splits.setdefault(str(split), []).append(
                {"path": file, "name": name, "subset": "" if subset == "." else subset}
            )
    return splits


@contextmanager
def quiet(small: bool) -> Iterator[None]:
    """Without progress bars where the work is small: those of a blink only clutter a log."""
    if not small or are_progress_bars_disabled() or datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _read(files: list[dict[str, str]]) -> Dataset:
    """Read files into Arrow, once: a file with other content is another dataset, whatever its date."""
    with open(__file__, "rb") as source:
        key = [source.read()]
    for file in files:
        try:
            with open(file["path"], "rb") as stream:
                key.append((file["name"], file["subset"], hashlib.file_digest(stream, "sha256").hexdigest()))
        except OSError as error:
            raise UserError(f"{file['name']} cannot be read ({error.strerror}); check the file") from None
    try:
        with quiet(small=sum(Path(file["path"]).stat().st_size for file in files) < SMALL):
            return Dataset.from_generator(
                records_of, features=RECORDS, gen_kwargs={"files": [files]}, fingerprint=Hasher.hash(key)
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except ValueError as error:  # from datasets, when not one row came
        raise UserError(f"{', '.join(file['name'] for file in files)}: no rows ({error})") from None


def records_of(files: list[list[dict[str, str]]]) -> Iterator[dict[str, Any]]:
    """Yield the records of files in order (each given as `path`, `name`, `subset`)."""
    import pyarrow

    for file in (file for group in files for file in group):
        try:
            for row, record in _file_records(Path(file["path"])):
                yield {"file": file["name"], "row": row, "subset": file["subset"] or None, "record": record}
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise UserError(
                f"{file['name']} cannot be read, it may be cut or damaged ({error}); download or write it again"
            ) from None


def _file_records(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.name.endswith(".parquet"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as parquet:
            rows = (row for batch in parquet.iter_batches(1_000) for row in batch.to_pylist())
            yield from ((number, json.dumps(row, default=_plain).encode()) for number, row in enumerate(rows, 1))
        return
    with open(path, "rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else open(path, "rb") as stream:
        if path.name.endswith((".json", ".json.gz")):
            whole = stream.read()
            try:
                rows = json.loads(whole)
                yield from (
                    (number, json.dumps(row).encode())
                    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1)
                )
                return
            except (ValueError, RecursionError) as error:
                if whole.strip(BLANK).startswith(b"["):
                    raise OSError(f"it starts as a JSON list, but {error}") from None
            stream.seek(0)  # one object a line, under the other usual name
        for number, line in enumerate(stream, 1):
            if line.strip(BLANK):
                yield number, line


def _plain(value: Any) -> str:
    """What JSON lacks: Parquet's binary columns hold text in UTF-8 when a writer did not say that they are text."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
