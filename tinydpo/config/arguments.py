"""The flags beyond TRL's own: which pairs, how they are packed, and how a recipe runs on any number of devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from datasets import ReadInstruction
from transformers.hf_argparser import HfArg

from tinydpo.files import public_name

OneOrMore = None | str | list[str]  # HfArgumentParser fails where `list` is second
MESSAGE_KEYS = ("role", "content")  # the names in --column that mean keys of messages, not columns
PER_DATASET_FLAGS = ("dataset_name", "dataset_config", "dataset_revision", "dataset_data_dir", "dataset_weights")


class Source(NamedTuple):
    """One dataset, and the share of its rows to train on."""

    name: str
    config: str | None
    revision: str | None
    data_dir: str | None
    weight: float

    def describe(self) -> str:
        """Name, revision and data folder for a page that others may read."""
        return " ".join(filter(None, (public_name(self.name, self.revision), self.data_dir)))


@dataclass
class DataArguments:
    """Which preference pairs, and how they are fitted to the token budget (`max_length`, TRL's own flag)."""

    dataset_name: OneOrMore = HfArg(
        default=None,
        help="Hub id, local folder, or a .jsonl, .jsonl.gz, .json, .csv or .parquet file. Several are read in turn; "
        "the flags below then hold for all of them, or have one value for each.",
    )
    dataset_config: OneOrMore = HfArg(default=None, help="Name of the dataset's configuration.")
    dataset_revision: OneOrMore = HfArg(default=None, help="Commit, tag or branch on the Hub.")
    dataset_data_dir: OneOrMore = HfArg(default=None, help="Folder to read, such as harmless-base.")
    dataset_weights: list[float] | None = HfArg(default=None, help="Share of a dataset's rows to train on, up to 1.")
    max_train_pairs: int | None = HfArg(default=None, help="Rows to draw from the train split, for a first try.")
    max_test_pairs: int | None = HfArg(default=None, help="Held-out rows to draw.")
    dataset_train_split: str = HfArg(
        default="train", help="Split to train on, or a slice such as train[:2000], taken from each of its files."
    )
    dataset_test_split: str = HfArg(default="test", help="Held-out split; without it, part of train is held out.")
    test_split_size: float = HfArg(
        default=0.05,
        help="Share of train to hold out in that case; every stage of the same slice holds out the same rows.",
    )
    column: list[str] | None = HfArg(
        default=None,
        help="Columns, or keys of messages: THEIRS=OURS, such as conversations=messages from=role value=content.",
    )
    role: list[str] | None = HfArg(default=None, help="Roles in messages: THEIRS=OURS, such as gpt=assistant.")
    chat: bool = HfArg(default=False, help="Write text prompts and answers as user and assistant messages.")
    max_question_length: int = HfArg(default=64, help="Tokens of the last human turn that the prompt always keeps.")
    on_bad_row: Literal["stop", "skip"] = HfArg(default="stop", help="skip: a broken row is dropped and counted.")

    def __post_init__(self):
        self.sources()
        parse_renames(self.column)
        parse_renames(self.role)
        if not all(0 < weight <= 1 for weight in self.dataset_weights or ()):
            raise ValueError(f"dataset_weights are shares above 0 and up to 1, got {self.dataset_weights}")
        for name in ("max_train_pairs", "max_test_pairs"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}; leave it out for all rows")
        if not 0 < self.test_split_size < 1:
            raise ValueError(f"test_split_size must be between 0 and 1, got {self.test_split_size}")
        if "[" in self.dataset_test_split:
            raise ValueError(f"dataset_test_split is a whole split, not {self.dataset_test_split}; use max_test_pairs")
        if "[" in self.dataset_train_split:
            parse_slice(self.dataset_train_split)

    @property
    def train_split_name(self) -> str:
        """The split to train on, without its slice."""
        return get_split_name(self.dataset_train_split)

    @property
    def names(self) -> str:
        """The datasets as a message names them."""
        return ", ".join(as_list(self.dataset_name))

    def sources(self) -> list[Source]:
        """The datasets, each with its own settings (ValueError: there are not as many as datasets)."""
        names = as_list(self.dataset_name)
        columns = [names]
        for flag in PER_DATASET_FLAGS[1:]:
            values = as_list(getattr(self, flag)) or [1.0 if flag == "dataset_weights" else None]
            if len(values) == 1:
                values = values * len(names)
            if len(values) != len(names):
                raise ValueError(f"{flag} has {len(values)} values for {len(names)} names in dataset_name")
            columns.append(values)
        return [Source(*values) for values in zip(*columns, strict=True)]


def list_sources(settings: Mapping[str, Any]) -> list[Source]:
    """The datasets that the settings of a run or an evaluation name."""
    return DataArguments(**{flag: settings.get(flag) for flag in PER_DATASET_FLAGS}).sources()


def get_split_name(split: str) -> str:
    """The name of a split or of a slice of it: `train` for `train[:25%]`."""
    return split.partition("[")[0]


def parse_slice(split: str) -> ReadInstruction:
    """One slice, such as `train[:25%]`, in the syntax of `datasets` (ValueError: it is malformed)."""
    if set("+(") & set(split):
        raise ValueError(f"{split} is not a slice such as train[:25%] (one slice, without + or a rounding)")
    try:
        return ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(f"{split} is not a slice such as train[:25%] ({error})") from None


def parse_renames(pairs: list[str] | None) -> dict[str, str]:
    """`THEIRS=OURS` pairs of `--column` or `--role` as a mapping (ValueError: one is malformed)."""
    names = {}
    for pair in pairs or ():
        theirs, _, ours = pair.rpartition("=")
        if not (theirs and ours):
            raise ValueError(f"column and role take THEIRS=OURS, such as question=prompt, not {pair!r}")
        names[theirs] = ours
    return names


def as_list(value: str | list | None) -> list:
    """A flag that holds one or several values, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


@dataclass
class RowArguments:
    """How pairs are packed into the rows that a model computes."""

    shared_prefix: bool = HfArg(
        default=True,
        help="Compute each prompt once, in rows without padding; same results. false: the plain padded forward.",
    )
    row_length: int | None = HfArg(
        default=None, help="Maximum tokens in a packed row; by default 512, or twice --max_length if that is more."
    )


def resolve_row_length(max_length: int, row_length: int | None) -> int:
    """The most tokens in a packed row: `row_length`, or 512, or more if a pair fitted to `max_length` needs it."""
    longest_pair = 2 * max_length
    if row_length is None:
        return max(512, longest_pair)
    if row_length < longest_pair:
        raise ValueError(
            f"row_length is {row_length}, but a pair needs up to twice max_length; "
            f"pass --row_length {longest_pair} or more"
        )
    return row_length


@dataclass
class RunArguments(RowArguments):
    """How the same recipe runs on any number of devices."""

    pairs_per_step: int | None = HfArg(
        default=None,
        help="Pairs (SFT: examples) per optimizer step over all devices. The batch is the largest one up to "
        "--per_device_train_batch_size that divides a device's share; accumulation does the rest.",
    )
    eval_pairs: int = HfArg(default=512, help="Held-out pairs, drawn once, that evaluation during training uses.")
    accelerate_config: str | None = HfArg(
        default=None, help="The accelerate file; the script checks that the run matches it."
    )


@dataclass
class ReferenceArguments:
    """The reference of a DPO run, where it is not the model that training starts from."""

    ref_model_name_or_path: str | None = HfArg(default=None, help="The reference; by default the model to train.")
    ref_model_revision: str | None = HfArg(default=None, help="Commit, tag or branch of a reference on the Hub.")


class Reference(NamedTuple):
    """A model's name, a folder or Hub id, and its revision there."""

    name: str
    revision: str | None


def find_reference(settings: dict[str, Any]) -> Reference | None:
    """A run's reference; None if it is the model that training starts from, or the run has no reference."""
    name = settings.get("ref_model_name_or_path")
    revision = settings.get("ref_model_revision")
    start = (settings["model_name_or_path"], settings.get("model_revision") or "main")
    if name is None or (name, revision or "main") == start:
        return None
    return Reference(name, revision)


def get_reference(config: dict[str, Any]) -> Reference:
    """What a recorded run's rewards are relative to: its reference, by default the model that it started from."""
    return find_reference(config) or Reference(config["model_name_or_path"], config.get("model_revision"))
