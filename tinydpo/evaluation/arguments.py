"""A policy that answers prompts: which one, how many, and how its answers are drawn."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tinydpo.config.arguments import RowArguments, resolve_row_length
from tinydpo.files import read_run_config
from tinydpo.models.loading import check_same_vocabulary, load_tokenizer


@dataclass
class PolicyArguments:
    """Who answers how many prompts, and where what comes of it goes."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The policy: folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch, on the Hub."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the results."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt + completion; a sampled answer gets half. By default the policy run's, or 128."
        },
    )
    num_prompts: int = field(default=512, metadata={"help": "Held-out prompts to answer."})
    batch_size: int = field(
        default=32,
        metadata={"help": "Sequences in one forward pass: memory against speed; another draws other samples."},
    )
    seed: int = field(default=0, metadata={"help": "Picks the prompts, where there are more, and the samples."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "What blocks compute in; auto: bfloat16 where the GPU or CPU is fast in it, else float32."},
    )

    def __post_init__(self):
        """Take an open length from the policy's run, and refuse what cannot be meant (ValueError)."""
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; needed are a policy and an output folder")
        if self.max_length is None:
            self.max_length = int(read_run_config(self.model_name_or_path).get("max_length") or 128)
        self.at_least(max_length=4, num_prompts=1, batch_size=1)

    def at_least(self, **bounds: int) -> None:
        """Refuse a number below its bound (ValueError)."""
        for name, bound in bounds.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")


@dataclass
class SamplingArguments(PolicyArguments):
    """How answers are drawn from the policy's distribution: as it is, unless these reshape it."""

    temperature: float = field(default=1.0, metadata={"help": "Divides the logits when sampling."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens only; 0: from all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this mass; 1: from all."})

    def __post_init__(self):
        """Refuse what cannot be sampled, too (ValueError)."""
        super().__post_init__()
        self.at_least(top_k=0)
        if not (self.temperature > 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature must be above 0 and top_p between 0 and 1, got {self.temperature} and {self.top_p}"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """What `sampling.sample_answers` is told of it."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "batch_size")}


@dataclass
class ComparisonArguments(PolicyArguments):
    """A policy and its reference, and the held-out prompts that both answer."""

    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference the policy was trained from (the SFT model): folder or Hub id."}
    )
    ref_model_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a reference on the Hub."}
    )

    def __post_init__(self):
        """Refuse a policy without its reference, too (ValueError)."""
        super().__post_init__()
        if not self.ref_model_name_or_path:
            raise ValueError("--ref_model_name_or_path is missing; pass the model that the policy was trained from")

    @property
    def models(self) -> dict[str, tuple[str, str | None]]:
        """Name and revision of each role, in the order in which to load them."""
        return {
            "policy": (self.model_name_or_path, self.model_revision),
            "ref": (self.ref_model_name_or_path, self.ref_model_revision),
        }

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models (UserError: it cannot be loaded, or their vocabularies differ)."""
        policy, ref = (load_tokenizer(*model) for model in self.models.values())
        check_same_vocabulary(policy, ref)
        return policy


@dataclass
class EvaluateArguments(RowArguments, ComparisonArguments, SamplingArguments):
    """How to compare them."""

    beta: float | None = field(
        default=None, metadata={"help": "β of implicit reward and loss; by default the policy run's own, or 0.1."}
    )

    def __post_init__(self):
        """Take β too from the policy's run, and refuse what cannot be measured (ValueError)."""
        super().__post_init__()
        if self.beta is None:
            self.beta = float(read_run_config(self.model_name_or_path).get("beta") or 0.1)
        if self.beta <= 0:
            raise ValueError(f"beta must be above 0, got {self.beta}")
        self.row_length = resolve_row_length(self.max_length, self.row_length) if self.shared_prefix else None
