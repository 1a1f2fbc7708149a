"""A policy that answers prompts: which one, how many, and how its answers are drawn."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tinydpo.files import read_run_config


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
