"""Flags of the commands that evaluate a trained policy: which models, prompts and rewards, how answers are sampled.

The scripts parse them with `defaults_from_run`: the policy's own run gives the defaults of its reference, data,
precision, `shared_prefix`, `max_length` and β.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from tinydpo.config.arguments import RowArguments, get_reference, resolve_row_length
from tinydpo.errors import UserError
from tinydpo.models.loading import check_model, check_same_vocabulary, load_tokenizer
from tinydpo.run_folder import RunFolder


def check_given(args: Any, *names: str, hint: str) -> None:
    """Raise a ValueError for the first of these flags without a value."""
    for name in names:
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing; {hint}")


def check_positive(args: Any, *names: str) -> None:
    """Raise a ValueError for the first of these flags that is below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")


def is_same_model(one: str, other: str) -> bool:
    """Whether two names are the same local folder, however it is written, or the same Hub id."""
    return Path(one).absolute() == Path(other).absolute()


@dataclass
class PolicyArguments:
    """A policy, the prompts that it answers, and where the results go."""

    model_name_or_path: str | None = HfArg(default=None, help="The policy: folder or Hub id.")
    model_revision: str | None = HfArg(default=None, help="Commit, tag or branch, on the Hub.")
    output_dir: str | None = HfArg(default=None, help="Folder for the results.")
    max_length: int = HfArg(default=128, help="Tokens of prompt + completion; half of them for a sampled answer.")
    num_prompts: int = HfArg(default=512, help="Held-out prompts to answer.")
    batch_size: int = HfArg(default=32, help="Sequences per forward pass; changing it changes the samples.")
    seed: int = HfArg(default=0, help="Chooses the prompts, if there are more, and the samples.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="By default that of the policy's run; without a run auto, bfloat16 where that is fast."
    )

    def __post_init__(self):
        check_given(self, "model_name_or_path", "output_dir", hint="pass a policy and an output folder")
        check_positive(self, "num_prompts", "batch_size")


@dataclass
class SamplingArguments(PolicyArguments):
    """How answers are sampled: by default from the policy's own distribution."""

    temperature: float = HfArg(default=1.0, help="Divides the logits when sampling; 0: the likeliest token.")
    top_k: int = HfArg(default=0, help="Sample from the k most likely tokens only; 0: from all.")
    top_p: float = HfArg(default=1.0, help="Sample from the likeliest tokens of this mass; 1: from all.")

    @property
    def sampling(self) -> dict[str, Any]:
        """The keyword arguments of `sampling.sample_answers`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "batch_size")}


@dataclass
class ComparisonArguments(PolicyArguments):
    """A policy and its reference, which answer the same held-out prompts."""

    ref_model_name_or_path: str | None = HfArg(
        default=None, help="By default that of the policy's run, often the SFT model."
    )
    ref_model_revision: str | None = HfArg(default=None, help="Commit, tag or branch of a reference on the Hub.")

    @property
    def models(self) -> dict[str, tuple[str, str | None]]:
        """Name and revision of the policy ("policy") and of the reference ("ref")."""
        return {
            "policy": (self.model_name_or_path, self.model_revision),
            "ref": (self.ref_model_name_or_path, self.ref_model_revision),
        }

    def describe_reference(self) -> str:
        """A line on a reference that is not the one of the policy's own run; else ""."""
        config = RunFolder.of_model(self.model_name_or_path).read_config()
        given = self.ref_model_name_or_path
        if not config or is_same_model(get_reference(config).name, given):
            return ""
        own = get_reference(config).name
        return f"The reference is {given}, that of the run was {own}: rewards and KL are not those of its training.\n"

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, after a check that policy, reference and `max_length` fit together (UserError)."""
        policy = load_tokenizer(*self.models["policy"])
        if not self.ref_model_name_or_path:
            raise UserError(
                f"{self.model_name_or_path} has no run_config.yaml, which would name its reference; pass "
                "--ref_model_name_or_path, the model that it was trained from"
            )
        ref = load_tokenizer(*self.models["ref"])
        check_same_vocabulary(policy, ref)
        for model in self.models.values():
            check_model(*model, policy, self.max_length)
        return policy


@dataclass
class EvaluateArguments(RowArguments, ComparisonArguments, SamplingArguments):
    """How policy and reference are compared."""

    beta: float = HfArg(default=0.1, help="β of the implicit reward and the DPO loss.")
    show_samples: int = HfArg(default=3, help="Prompts to print with both answers; all are in samples.jsonl.")

    def __post_init__(self):
        super().__post_init__()
        self.row_length = resolve_row_length(self.max_length, self.row_length) if self.shared_prefix else None


@dataclass
class RewardArguments:
    """Which rewards are summed."""

    reward_funcs: list[str] | None = HfArg(default=None, help="Rewards as module.function, in TRL's form; summed.")
    reward_model_name_or_path: str | None = HfArg(default=None, help="A sequence-classification model of one output.")
    reward_model_revision: str | None = HfArg(default=None, help="Commit, tag or branch of a reward model on the Hub.")

    def names(self) -> list[str]:
        """The shortest names that tell them apart: of a function its own, of a model the last part of its path."""
        full = list(self.reward_funcs or [])
        short = [name.rsplit(".", 1)[-1] for name in full]
        if self.reward_model_name_or_path:
            full.append(self.reward_model_name_or_path)
            short.append(Path(self.reward_model_name_or_path).name)
        return short if len(set(short)) == len(short) else full

    def name(self) -> str:
        """The name of the sum, as the label of an axis."""
        return " + ".join(self.names())


@dataclass
class RoundArguments:
    """Which recipes make a round, and how many rounds."""

    recipe: str | None = HfArg(default=None, help="Folder with pairs.yaml, dpo-on-policy.yaml and evaluate.yaml.")
    rounds: int = HfArg(default=2, help="Rounds in all; finished rounds are not repeated.")
    output_dir: str | None = HfArg(default=None, help="Folder of the rounds; by default runs/<recipe folder>.")
    model_name_or_path: str | None = HfArg(default=None, help="Where the first round starts, the reference of all.")
    dataset_name: str | None = HfArg(default=None, help="Prompts and held-out pairs; by default the recipes' own.")
    seed: int = HfArg(default=0, help="Of sampling, training and evaluation.")

    def __post_init__(self):
        check_given(self, "recipe", hint="recipes/quickstart shows what a round needs")
        check_positive(self, "rounds")
        self.output_dir = self.output_dir or f"runs/{Path(self.recipe).resolve().name}"
