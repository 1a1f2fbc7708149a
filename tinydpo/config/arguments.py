"""The flags beyond TRL's own: which pairs, how they lie in rows, and how a recipe runs on any number of devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers.hf_argparser import HfArg

# What a column of the data can be, and a key of its messages.
COLUMNS = (
    "prompt", "chosen", "rejected", "completion", "messages", "system", "tools", "chat_template_kwargs", "subset",
)  # fmt: skip
MESSAGE_KEYS = ("role", "content")
# Flags that hold one value, or one for each dataset.
PER_DATASET_FLAGS = ("dataset_name", "dataset_config", "dataset_revision", "dataset_data_dir")


class Source(NamedTuple):
    """One dataset, and the share of its rows to train on."""

    name: str
    config: str | None
    revision: str | None
    data_dir: str | None
    weight: float


@dataclass
class DataArguments:
    """Which preference pairs, and how they are fitted to the token budget (`max_length`, TRL's own flag)."""

    dataset_name: list[str] | None = HfArg(
        default=None,
        help="Hub id, local folder, or a .jsonl, .jsonl.gz, .json or .parquet file. Several are read in turn; the "
        "flags below then hold for all of them, or have one value for each.",
    )
    dataset_config: list[str] | None = HfArg(default=None, help="Name of the dataset's configuration.")
    dataset_revision: list[str] | None = HfArg(default=None, help="Commit, tag or branch of a dataset on the Hub.")
    dataset_data_dir: list[str] | None = HfArg(
        default=None, help="Folder inside the dataset to read, for example harmless-base."
    )
    dataset_weights: list[float] | None = HfArg(
        default=None, help="Share of each dataset's rows to train on, above 0 and up to 1."
    )
    max_train_pairs: int | None = HfArg(
        default=None, help="Rows to draw from the train split, the same in every stage: for a first try."
    )
    max_test_pairs: int | None = HfArg(default=None, help="Held-out rows to draw, likewise.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str = HfArg(
        default="test", help="Held-out split; where there is none, --test_split_size is held out of train."
    )
    test_split_size: float = HfArg(
        default=0.05,
        help="Share of the train split to hold out when there is no test split: the same rows in SFT, DPO and "
        "evaluation, whatever the --seed.",
    )
    column: list[str] | None = HfArg(
        default=None,
        help="Columns, or keys of messages: THEIRS=OURS, one or more, such as question=prompt, or "
        "conversations=messages from=role value=content.",
    )
    role: list[str] | None = HfArg(
        default=None, help="Roles in messages: THEIRS=OURS, one or more, such as human=user gpt=assistant."
    )
    max_question_length: int = HfArg(
        default=64, help="Tokens of the last human turn that are always kept in the prompt."
    )
    on_bad_row: Literal["stop", "skip"] = HfArg(
        default="stop", help="stop: a broken row ends the run; skip: it is dropped and counted."
    )

    def __post_init__(self):
        """Check the values (ValueError)."""
        for flag in PER_DATASET_FLAGS:
            setattr(self, flag, unwrap_single(as_list(getattr(self, flag))))
        self.sources()
        if not all(0 < weight <= 1 for weight in self.dataset_weights or ()):
            raise ValueError(f"dataset_weights are shares above 0 and up to 1, got {self.dataset_weights}")
        if not 0 < self.test_split_size < 1:
            raise ValueError(f"test_split_size must lie between 0 and 1, got {self.test_split_size}")
        for flag in ("max_train_pairs", "max_test_pairs", "max_question_length"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, flag)}")
        for flag in ("column", "role"):
            for theirs, ours in parse_renames(getattr(self, flag), flag).items():
                if flag == "column" and ours not in COLUMNS + MESSAGE_KEYS:
                    known = ", ".join(COLUMNS + MESSAGE_KEYS)
                    raise ValueError(f"column: {theirs}={ours} names no column that is read; these are {known}")

    @property
    def names(self) -> str:
        """The datasets as a message names them."""
        return ", ".join(as_list(self.dataset_name))

    def sources(self) -> list[Source]:
        """The datasets, each with its own settings (ValueError: there are not as many as datasets)."""
        names = as_list(self.dataset_name)
        columns = [names]
        for flag in (*PER_DATASET_FLAGS[1:], "dataset_weights"):
            values = as_list(getattr(self, flag)) or [1.0 if flag == "dataset_weights" else None]
            if names and len(values) not in (1, len(names)):
                raise ValueError(
                    f"{flag} has {len(values)} values for {len(names)} names in dataset_name; "
                    f"give one, or {len(names)}"
                )
            columns.append(values * len(names) if len(values) == 1 else values)
        return [Source(*values) for values in zip(*columns, strict=False)]


def list_sources(settings: Mapping[str, Any]) -> list[Source]:
    """The datasets that the settings of a run or an evaluation name."""
    return DataArguments(**{flag: settings.get(flag) for flag in (*PER_DATASET_FLAGS, "dataset_weights")}).sources()


def parse_renames(pairs: list[str] | None, flag: str = "column") -> dict[str, str]:
    """`THEIRS=OURS` pairs as a mapping (ValueError: one has no such form)."""
    names = {}
    for pair in pairs or ():
        theirs, _, ours = pair.rpartition("=")
        if not (theirs and ours):
            raise ValueError(f"{flag}: {pair!r} is not THEIRS=OURS, such as question=prompt")
        names[theirs] = ours
    return names


def as_list(value: str | list | None) -> list:
    """A flag that holds one or several values, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def unwrap_single(values: list) -> Any:
    """Several values as a list, one as itself, none as None: as recipes write them."""
    return values if len(values) > 1 else next(iter(values), None)


@dataclass
class RowArguments:
    """How pairs lie in the rows that a model computes."""

    shared_prefix: bool = HfArg(
        default=True,
        help="Compute each pair's prompt once, in rows without padding; same results to rounding. false: the plain "
        "padded forward, for models whose attention does not allow it.",
    )
    row_length: int | None = HfArg(
        default=None, help="Most tokens in such a row: by default 512, or twice --max_length if that is more."
    )


def resolve_row_length(max_length: int, row_length: int | None) -> int:
    """The most tokens in a packed row: `row_length`, or 512, or more if a pair fitted to `max_length` needs it.

    Raises:
        ValueError: a pair can be longer than `row_length`.
    """
    longest_pair = 2 * max_length
    if row_length is None:
        return max(512, longest_pair)
    if row_length < longest_pair:
        raise ValueError(
            f"row_length is {row_length}, but a pair fitted to max_length {max_length} can take twice that; pass "
            f"--row_length {longest_pair} or more"
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
        default=None, help="The file given to `accelerate launch`, to check that what it asks for is what runs."
    )

    def __post_init__(self):
        """Check the values (ValueError)."""
        if self.eval_pairs < 1:
            raise ValueError(f"eval_pairs must be at least 1, got {self.eval_pairs}; --eval_strategy no turns it off")


@dataclass
class ReferenceArguments:
    """The reference of a DPO run, where it is not the model that training starts from."""

    ref_model_name_or_path: str | None = HfArg(
        default=None, help="The reference: folder or Hub id; by default the model that training starts from."
    )
    ref_model_revision: str | None = HfArg(default=None, help="Commit, tag or branch of a reference on the Hub.")

    def __post_init__(self):
        """Check the values (ValueError)."""
        if self.ref_model_revision and not self.ref_model_name_or_path:
            raise ValueError(
                f"ref_model_revision is {self.ref_model_revision}, but --ref_model_name_or_path is not set"
            )


class Reference(NamedTuple):
    """A model's name, a folder or Hub id, and its revision there."""

    name: str
    revision: str | None


def find_reference(settings: dict[str, Any]) -> Reference | None:
    """A run's reference; None where it is the model that training starts from, or the run has none."""
    name = settings.get("ref_model_name_or_path")
    revision = settings.get("ref_model_revision")
    start = (settings["model_name_or_path"], settings.get("model_revision") or "main")
    if name is None or (name, revision or "main") == start:
        return None
    return Reference(name, revision)
