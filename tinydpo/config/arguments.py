"""What a recipe may say beyond TRL's and transformers' own flags: which pairs, and how they run on any devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# What a column of the data can be, and a key of its messages.
COLUMNS = (
    "prompt", "chosen", "rejected", "completion", "messages", "system", "tools", "chat_template_kwargs", "subset",
)  # fmt: skip
MESSAGE_KEYS = ("role", "content")
PER_DATASET_FLAGS = (
    "dataset_name",
    "dataset_config",
    "dataset_revision",
    "dataset_data_dir",
)  # one, or one for each dataset


def resolve_row_length(max_length: int, asked: int | None) -> int:
    """The most tokens in a packed row: what was asked for, or 512, or more if a pair fitted to `max_length` needs it.

    Raises:
        ValueError: a pair can be longer than the row asked for.
    """
    longest_pair = 2 * max_length
    if asked is not None and asked < longest_pair:
        raise ValueError(
            f"row_length is {asked}, but a pair fitted to max_length {max_length} can take twice that; pass "
            f"--row_length {longest_pair} or more"
        )
    return asked or max(512, longest_pair)


def parse_renames(pairs: list[str] | None) -> dict[str, str]:
    """`THEIRS=OURS` pairs as a mapping.

    Raises:
        ValueError: one is none.
    """
    named = {}
    for pair in pairs or ():
        theirs, _, ours = pair.rpartition("=")
        if not (theirs and ours):
            raise ValueError(f"{pair!r} is no pair of names, such as question=prompt")
        named[theirs] = ours
    return named


def as_list(value: str | list | None) -> list:
    """A flag that takes one or several, as a YAML file holds it, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def unwrap_single(values: list) -> Any:
    """Several as a list, one as itself, none as None: as recipes write them."""
    return values if len(values) > 1 else next(iter(values), None)


class Source(NamedTuple):
    """One dataset: its name, and where given its configuration, revision, folder, and the share of it to train on."""

    name: str
    config: str | None
    revision: str | None
    data_dir: str | None
    weight: float


@dataclass
class DataArguments:
    """Which preference pairs, and how they are fitted to the token budget (`max_length`, TRL's own flag)."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder, or a .jsonl, .jsonl.gz, .json or .parquet file. Several are read one after "
            "the other; what follows is then for all of them, or one for each."
        },
    )
    dataset_config: list[str] | None = field(default=None, metadata={"help": "Name of the dataset's configuration."})
    dataset_revision: list[str] | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a dataset on the Hub."}
    )
    dataset_data_dir: list[str] | None = field(
        default=None, metadata={"help": "Folder inside the dataset to read, for example harmless-base."}
    )
    dataset_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of each dataset's rows to train on, above 0 and up to 1."}
    )
    max_train_pairs: int | None = field(
        default=None,
        metadata={
            "help": "Rows to draw from those to train on, the same in every stage: for a first try on large data."
        },
    )
    max_test_pairs: int | None = field(default=None, metadata={"help": "Held-out rows to draw, likewise."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Held-out split; where there is none, --test_split_size is held out of train."},
    )
    test_split_size: float = field(
        default=0.05,
        metadata={
            "help": "Share of the train split to hold out when the data has no test split. The choice depends on the "
            "data alone, so that SFT, DPO and evaluation hold out the same rows under any --seed."
        },
    )
    column: list[str] | None = field(
        default=None,
        metadata={
            "help": "What columns of the data, or keys of their messages, are: THEIRS=OURS, one or more, for example "
            "question=prompt, or conversations=messages from=role value=content."
        },
    )
    role: list[str] | None = field(
        default=None,
        metadata={
            "help": "What roles in messages are: THEIRS=OURS, one or more, for example human=user gpt=assistant."
        },
    )
    max_question_length: int = field(
        default=64,
        metadata={"help": "Tokens of the last human turn that a long completion can never push out of the prompt."},
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "stop: a broken row ends the run; skip: it is dropped and counted."}
    )

    def __post_init__(self):
        """Refuse what cannot be meant (ValueError)."""
        for flag in PER_DATASET_FLAGS:
            setattr(self, flag, unwrap_single(as_list(getattr(self, flag))))
        if not all(0 < weight <= 1 for weight in self.dataset_weights or ()):
            raise ValueError(f"dataset_weights are shares above 0 and up to 1, got {self.dataset_weights}")
        for flag in ("max_train_pairs", "max_test_pairs"):
            if getattr(self, flag) is not None and getattr(self, flag) < 1:
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, flag)}")
        self.sources()
        if not 0 < self.test_split_size < 1:
            raise ValueError(f"test_split_size must lie between 0 and 1, got {self.test_split_size}")
        for flag in ("column", "role"):
            try:
                named = parse_renames(getattr(self, flag))
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from None
            for theirs, ours in named.items():
                if flag == "column" and ours not in COLUMNS + MESSAGE_KEYS:
                    known = ", ".join(COLUMNS + MESSAGE_KEYS)
                    raise ValueError(f"column: {theirs}={ours} names no column that is read; these are {known}")
        if self.max_question_length < 1:
            raise ValueError(f"max_question_length must be at least 1, got {self.max_question_length}")

    @property
    def names(self) -> str:
        """The datasets as a message names them."""
        return ", ".join(as_list(self.dataset_name))

    def sources(self) -> list[Source]:
        """The datasets, each with what belongs to it.

        Raises:
            ValueError: what is given for each is given for another number of them.
        """
        columns: list[list] = [as_list(self.dataset_name)]
        count = len(columns[0])
        for flag in (*PER_DATASET_FLAGS[1:], "dataset_weights"):
            values = as_list(getattr(self, flag)) or [1.0 if flag == "dataset_weights" else None]
            if count and len(values) not in (1, count):
                raise ValueError(
                    f"{flag} has {len(values)} values for {count} names in dataset_name; give one, or {count}"
                )
            columns.append(values * count if len(values) == 1 else values)
        return [Source(*values) for values in zip(*columns, strict=False)]


def list_sources(settings: Mapping[str, Any]) -> list[Source]:
    """The datasets that the settings of a run or an evaluation name."""
    return DataArguments(**{flag: settings.get(flag) for flag in (*PER_DATASET_FLAGS, "dataset_weights")}).sources()


@dataclass
class RowArguments:
    """How pairs lie in the rows that a model computes."""

    shared_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute each pair's prompt once, in rows without padding; same results to rounding. false: the "
            "plain padded forward, for models whose attention does not allow it."
        },
    )
    row_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in such a row. Longer: less padding, but attention over more that the mask hides. By "
            "default 512, or twice --max_length if that is more."
        },
    )


@dataclass
class RunArguments(RowArguments):
    """How the same recipe runs on any number of devices."""

    pairs_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Pairs (SFT: examples) per optimizer step over all devices. Batch and accumulation follow: the "
            "largest batch up to --per_device_train_batch_size that divides each device's share."
        },
    )
    eval_pairs: int = field(
        default=512, metadata={"help": "Held-out pairs, drawn once at random, that evaluation during training uses."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "The file given to `accelerate launch`, to check that what it asks for is what runs."},
    )

    def __post_init__(self):
        """Refuse what cannot be meant (ValueError)."""
        if self.eval_pairs < 1:
            raise ValueError(f"eval_pairs must be at least 1, got {self.eval_pairs}; --eval_strategy no turns it off")


@dataclass
class ReferenceArguments:
    """What a DPO run is held against, where that is another model than the one it starts from."""

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The reference: folder or Hub id; by default the model that training starts from. For rounds, "
            "which start from the last policy and keep the first SFT model."
        },
    )
    ref_model_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a reference on the Hub."}
    )

    def __post_init__(self):
        """Refuse what cannot be meant (ValueError)."""
        if self.ref_model_revision and not self.ref_model_name_or_path:
            raise ValueError(
                f"ref_model_revision is {self.ref_model_revision}, of no model; pass --ref_model_name_or_path as well"
            )


class Reference(NamedTuple):
    """A model's name, a folder or Hub id, and its revision there."""

    name: str
    revision: str | None


def find_reference(resolved: dict[str, Any]) -> Reference | None:
    """A run's reference; None where that is the model it starts from, or the run has none.

    Args:
        resolved: every key of the run with its value.
    """
    name, revision = resolved.get("ref_model_name_or_path"), resolved.get("ref_model_revision")
    start = resolved["model_name_or_path"], resolved.get("model_revision") or "main"
    return None if name is None or (name, revision or "main") == start else Reference(name, revision)
