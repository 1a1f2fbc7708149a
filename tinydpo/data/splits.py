"""Where rows come from: the Hub, a local folder, or one file. One record (JSON bytes) a row, with its file and number.

Records stay undecoded until `dialogues` reads them, so that a broken one can be named by file and row; they lie in
Arrow on disk, so that memory stays flat. Splits, configurations and file patterns are resolved by `datasets`.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from tinydpo.config.arguments import DataArguments, Source
from tinydpo.data import CACHE_VERSION
from tinydpo.data.rows import BrokenRow, ColumnNames, decode_row, parse_json, read_row, rename_columns
from tinydpo.errors import UserError
from tinydpo.models.hub import download_dataset

RECORD_FEATURES = Features(
    {"file": Value("string"), "row": Value("int64"), "subset": Value("string"), "record": Value("binary")}
)
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SMALL_BYTES = 8 << 20  # bytes of files read without a progress bar
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte-order mark included, which is read over
NOT_ROWS = {  # how files start that hold something else than their name says
    b"version https://git-lfs": "a Git LFS pointer in place of the data; fetch the data with `git lfs pull`",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it, only gzip is read",
    b"BZh": "compressed with bzip2; unpack it, only gzip is read",
    b"\xfd7zXZ": "compressed with xz; unpack it, only gzip is read",
    b"PK\x03\x04": "a zip archive; unpack it, only gzip is read",
}
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of every whole Arrow file in the cache


def load_records(data: DataArguments) -> DatasetDict:
    """Read the train and the held-out records; what is held out of train are whole prompts.

    Several datasets follow one another, told apart by `subset`.

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
    sources = data.sources()
    parts = [_load_source(data, source, label) for source, label in zip(sources, label_sources(sources), strict=True)]
    train = concatenate_datasets(
        [draw_share(part["train"], one.weight) for one, part in zip(sources, parts, strict=True)]
    )
    return DatasetDict({"train": train, "test": concatenate_datasets([part["test"] for part in parts])})


def _load_source(data: DataArguments, source: Source, label: str) -> DatasetDict:
    train, test = data.dataset_train_split, data.dataset_test_split
    splits = _find_split_files(source, train)
    for split in (train, test):
        may_lack = split == test == "test"  # the default, so nobody asked for it by name
        if split not in splits and not may_lack:
            raise UserError(
                f"{source.name} has no split {split!r}, only {', '.join(sorted(splits))}; "
                f"check --dataset_{'test' if split == test else 'train'}_split"
            )
    for file in (file for files in splits.values() for file in files if label):
        inside = file["subset"].removeprefix(source.data_dir or "").strip("/")
        file["subset"] = f"{label}/{inside}".rstrip("/")
    if test in splits:
        return DatasetDict({"train": _read_files(splits[train]), "test": _read_files(splits[test])})
    records = _read_files(splits[train])
    try:
        with hide_progress_bars(small=records.data.nbytes < SMALL_BYTES):
            rest, held_out = hold_out(records, data.test_split_size, ColumnNames.of(data), HOLD_OUT_SEED)
        return DatasetDict({"train": rest, "test": held_out})
    except ValueError:  # one side would be empty
        raise UserError(
            f"{source.name} has {len(records)} row(s), too few to hold out a share of {data.test_split_size}; "
            "write one row a line, add rows or a test split"
        ) from None


def _find_split_files(source: Source, train: str) -> dict[str, list[dict[str, str]]]:
    try:
        path = Path(source.name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: the `~user` of nobody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{source.name[:200]} cannot be read ({reason}); check --dataset_name") from None
    if is_file:
        if not path.name.endswith(FILE_SUFFIXES):
            raise UserError(f"{path} is not a .jsonl, .jsonl.gz, .json or .parquet file")
        return {train: [{"path": str(path), "name": _printable(path), "subset": ""}]}
    if is_folder:
        return _find_folder_files(path, source)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source.name) or path.name.endswith(FILE_SUFFIXES):
        raise UserError(f"there is no file or folder {source.name!r}; check --dataset_name")
    folder = download_dataset(source.name, source.revision, source.data_dir)
    return _find_folder_files(folder, source)


def _find_folder_files(folder: Path, source: Source) -> dict[str, list[dict[str, str]]]:
    """Every split's files, as `datasets` resolves them from the folder's names and its README."""
    if source.data_dir and not (folder / source.data_dir).is_dir():
        raise UserError(f"{source.name} has no folder {source.data_dir!r}; check --dataset_data_dir")
    for file in sorted(folder.rglob("*")):  # which `datasets` would pass over, and a split with it
        if file.name.endswith(FILE_SUFFIXES) and file.is_symlink() and not file.exists():
            raise UserError(f"{file} links to a file that is not there; put the file there or delete the link")
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a README may well be without metadata
    try:
        builder = load_dataset_builder(str(folder), name=source.config, data_dir=source.data_dir)
    except Exception as error:  # a README's metadata can be anything, and so can what is raised over them
        reason = str(error).partition("\nExample of usage")[0]
        raise UserError(
            f"{source.name} is not a dataset that can be read: {reason}; check its files, what its README.md "
            "says of them, --dataset_config and --dataset_data_dir"
        ) from None
    root, splits, data_files = folder.resolve(), {}, builder.config.data_files
    # Counted within a split: folders that only tell train from test are no subsets.
    several = any(len({Path(file).parent for file in files}) > 1 for files in data_files.values())
    for split, files in data_files.items():
        for file in sorted(files):
            inside = Path(file).relative_to(root) if Path(file).is_relative_to(root) else Path(Path(file).name)
            if not inside.name.endswith(FILE_SUFFIXES):
                raise UserError(f"{source.name}: {inside} is not a .jsonl, .jsonl.gz, .json or .parquet file")
            subset = inside.parent.as_posix() if several or source.data_dir else "."
            name = _printable(f"{source.name.rstrip('/')}/{inside.as_posix()}")
            splits.setdefault(str(split), []).append(
                {"path": file, "name": name, "subset": "" if subset == "." else subset}
            )
    _refuse_two_formats(folder, {Path(file) for files in data_files.values() for file in files})
    return splits


def _refuse_two_formats(folder: Path, read: set[Path]) -> None:
    """Where JSON and Parquet lie side by side, `datasets` would read one of them and not say so."""
    readme = folder / "README.md"
    if readme.is_file() and b"configs:" in readme.read_bytes():  # somebody chose
        return
    for file in sorted(file for parent in {file.parent for file in read} for file in parent.iterdir()):
        parquet = file.name.endswith(".parquet")
        other = file.name.endswith(FILE_SUFFIXES) and any(parquet != one.name.endswith(".parquet") for one in read)
        if other and file not in read and not file.name.startswith("."):
            raise UserError(f"{file} would not be read beside files of another format; keep one format in a folder")


def _printable(path: Path | str) -> str:
    """A path as messages and the cache can hold it: names on disk are bytes, and need not be UTF-8."""
    return os.fsencode(path).decode(errors="replace")


@contextmanager
def hide_progress_bars(small: bool) -> Iterator[None]:
    """Without progress bars where the work is small: those of a blink only clutter a log."""
    if not small or are_progress_bars_disabled() or datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _read_files(files: list[dict[str, str]]) -> Dataset:
    """Read files into Arrow, once: a file with other content is another dataset, whatever its date."""
    key = [CACHE_VERSION]
    for file in files:
        try:
            with open(file["path"], "rb") as stream:
                key.append((file["name"], file["subset"], hashlib.file_digest(stream, "sha256").hexdigest()))
        except OSError as error:
            raise UserError(f"{file['name']} cannot be read ({error.strerror}); check the file") from None
    fingerprint = Hasher.hash(key)
    drop_cut(fingerprint)
    try:
        with hide_progress_bars(small=sum(Path(file["path"]).stat().st_size for file in files) < SMALL_BYTES):
            return Dataset.from_generator(
                iter_records, features=RECORD_FEATURES, gen_kwargs={"files": [files]}, fingerprint=fingerprint
            )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    except ValueError as error:  # from datasets, when not one row came
        raise UserError(f"{', '.join(file['name'] for file in files)}: no rows ({error})") from None


def drop_cut(fingerprint: str) -> None:
    """Take cut files out of the cache of the records with this fingerprint, so that they are made again.

    All that is made from these records (texts, tokens, reference log-probs, choices of rows) lies in the same folder.
    `datasets` writes each file under another name first; only what befalls the disk afterwards can cut one. Cut where
    one batch of rows ends, Arrow would read it as a whole file of fewer rows.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "generator"
    for file in sorted(cache.glob(f"default-*{fingerprint}*/*/*.arrow")):
        if file.parent.suffix == ".incomplete":  # a process is at it, or was killed: `datasets` begins again there
            continue
        with open(file, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - len(STREAM_END)))
            whole = stream.read() == STREAM_END
        if not whole:
            print(f"{file} in the cache is cut or damaged; what it held is made again.", file=sys.stderr)
            if file.name.startswith("generator-"):  # by its information `datasets` tells that records are there
                (file.parent / datasets.config.DATASET_INFO_FILENAME).unlink(missing_ok=True)
            file.unlink(missing_ok=True)


def iter_records(files: list[list[dict[str, str]]]) -> Iterator[dict[str, Any]]:
    """Yield the records of files in order (each given as `path`, `name`, `subset`)."""
    import pyarrow

    for file in (file for group in files for file in group):
        try:
            with open(file["path"], "rb") as stream:
                start = stream.read(32)
            if found := next((found for magic, found in NOT_ROWS.items() if start.startswith(magic)), None):
                raise UserError(f"{file['name']} is {found}")
            for row, record in _iter_file_records(Path(file["path"]), start):
                yield {"file": file["name"], "row": row, "subset": file["subset"] or None, "record": record}
        except (OSError, EOFError, ValueError, OverflowError, zlib.error, pyarrow.ArrowException) as error:
            raise UserError(
                f"{file['name']} cannot be read, it may be cut or damaged ({error}); download or write it again"
            ) from None


def _iter_file_records(path: Path, start: bytes) -> Iterator[tuple[int, bytes]]:
    if path.name.endswith(".parquet") or start.startswith(b"PAR1"):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise OSError(f"it has two columns {twice!r}")
            rows = (row for batch in parquet.iter_batches(1_000) for row in batch.to_pylist())
            yield from (
                (number, json.dumps(row, default=_to_json_value).encode()) for number, row in enumerate(rows, 1)
            )
        return
    with gzip.open(path) if start.startswith(b"\x1f\x8b") else open(path, "rb") as stream:
        if path.name.endswith((".json", ".json.gz")):
            whole = stream.read()
            try:
                rows = parse_json(whole)
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


def _to_json_value(value: Any) -> str:
    """What JSON lacks: Parquet's binary columns hold text in UTF-8 when a writer did not say that they are text."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


SHARED_PROMPT_NOTE = "the prompt stands in the train split too"
PROMPT_FEATURES = Features({"prompt": Value("int64")})


def hold_out(records: Dataset, size: float, names: ColumnNames, seed: int) -> tuple[Dataset, Dataset]:
    """Split records into train and held-out ones, prompt by prompt, the same way for the same records.

    Where there is but one prompt, rows are held out.

    Args:
        records: as `sources.load_records` gives them.
        size: the share of rows to hold out; as many as fit whole prompts, at least one.
        names: what the data call their columns and roles.
        seed: of the draw.

    Returns:
        The train and the held-out records, each in the order of the draw.

    Raises:
        ValueError: one of them would be empty.
    """
    prompts = _number_prompts(records, names)
    wanted = int(np.ceil(size * len(records)))
    if not 0 < wanted < len(records):
        raise ValueError(f"{wanted} of {len(records)} rows cannot be held out")
    order = np.random.default_rng(seed).permutation(len(records))
    numbers, rows = np.unique(prompts, return_inverse=True, return_counts=True)[1:]
    if len(rows) == 1:
        numbers, rows = np.arange(len(records)), np.ones(len(records), dtype=int)
    drawn = numbers[order]
    in_turn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]  # each prompt where its first row is drawn
    held, count = np.zeros(len(rows), dtype=bool), 0
    for prompt in in_turn.tolist():
        if count + rows[prompt] <= wanted:
            held[prompt], count = True, count + rows[prompt]
    if not count:
        held[min(in_turn.tolist(), key=lambda prompt: rows[prompt])] = True
    chosen = held[drawn]
    return _select_rows(records, order[~chosen], "train", names), _select_rows(records, order[chosen], "test", names)


def count_shared_prompts(train: Dataset, test: Dataset) -> int:
    """How many rows of `test` have a `prompt` that is one of `train`'s, both the columns of `dialogues.TEXTS`."""
    asked = [hash(prompt) for prompt in test["prompt"][:]]  # not the texts themselves: they may be gigabytes
    trained, left = set(), set(asked)
    for batch in train.select_columns("prompt").iter(1_000):
        trained.update(left.intersection(map(hash, batch["prompt"])))
    return sum(prompt in trained for prompt in asked)


def _number_prompts(records: Dataset, names: ColumnNames) -> np.ndarray:
    """A number for each row's prompt; a row that cannot be read has one of its own."""

    def number(batch: dict[str, list]) -> dict[str, list]:
        places = zip(batch["file"], batch["row"], batch["record"], strict=True)
        return {"prompt": [_hash_prompt(file, row, record, names) for file, row, record in places]}

    fingerprint = Hasher.hash((records._fingerprint, "prompts", *_made_by(names)))
    numbered = records.map(
        number, batched=True, remove_columns=records.column_names, features=PROMPT_FEATURES, new_fingerprint=fingerprint,
        desc="Finding prompts",
    )  # fmt: skip
    return numbered.with_format("numpy")[:]["prompt"]


def _hash_prompt(file: str, row: int, record: bytes, names: ColumnNames) -> int:
    try:
        form = read_row(rename_columns(decode_row(record), names), need_pairs=None)
        of = (form.system, form.prompt)
    except BrokenRow:
        of = (file, row)
    digest = hashlib.blake2b(json.dumps(of, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _select_rows(records: Dataset, rows: np.ndarray, split: str, names: ColumnNames) -> Dataset:
    """These rows, with the choice on disk."""
    fingerprint = Hasher.hash((records._fingerprint, split, rows.tobytes(), *_made_by(names)))
    path = records._get_cache_file_path(fingerprint)
    return records.select(rows, indices_cache_file_name=path, new_fingerprint=fingerprint)


def _made_by(names: ColumnNames) -> list:
    return [sorted(names.columns.items()), sorted(names.roles.items()), CACHE_VERSION]


HOLD_OUT_SEED = 42  # not the run's seed: SFT, DPO and evaluation must draw and hold out the same rows


def draw_share(records: Dataset, share: float) -> Dataset:
    """A share of the records (at least one), in their order: a choice that depends on the data alone."""
    if share == 1:
        return records
    drawn = np.random.default_rng(HOLD_OUT_SEED).permutation(len(records))[: max(1, round(share * len(records)))]
    return records.select(np.sort(drawn))


def draw_rows(records: Dataset, most: int | None) -> Dataset:
    """At most so many records, drawn likewise."""
    return records if most is None else draw_share(records, min(1.0, most / len(records)))


def label_sources(sources: list[Source]) -> list[str]:
    """A name for each of several datasets: as short as tells them apart; of one, none.

    Raises:
        UserError: one stands there twice.
    """
    if len(sources) == 1:
        return [""]
    names = [source.name.rstrip("/") for source in sources]
    for found in (
        [Path(source.data_dir or name).name.split(".")[0] for source, name in zip(sources, names, strict=True)],
        ["/".join(filter(None, (name, source.data_dir))) for source, name in zip(sources, names, strict=True)],
    ):
        if len(set(found)) == len(found):
            return found
    twice = next(name for name in found if found.count(name) > 1)
    raise UserError(f"dataset_name has {twice} twice, so that its rows would count twice; name it once")
