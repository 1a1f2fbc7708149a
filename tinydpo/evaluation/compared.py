"""What a policy has learned against its reference: what to compare, and where it goes.

`logps` and `sampling` ask the models, `metrics` does the arithmetic, `evaluation_table` words it, and
`scripts/evaluate.py` puts them together.
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tinydpo.data.trained import trained_share
from tinydpo.files import read_run_config
from tinydpo.launching.arguments import RowArguments, row_length_for
from tinydpo.models.pretrained import check_same_vocabulary, load_tokenizer


@dataclass
class ComparedModels:
    """A policy and its reference, and the held-out prompts that both answer."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The policy: folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch, on the Hub."})
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The reference the policy was trained from (the SFT model): folder or Hub id."}
    )
    ref_model_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a reference on the Hub."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results; report.html is written beside it."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt + completion; a sampled answer gets half. By default the policy run's, or 128."
        },
    )
    num_prompts: int = field(default=512, metadata={"help": "Held-out prompts that both models answer."})
    batch_size: int = field(
        default=32,
        metadata={"help": "Sequences in one forward pass: memory against speed; another draws other samples."},
    )
    seed: int = field(default=0, metadata={"help": "Picks the prompts and the samples."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "What blocks compute in; auto: bfloat16 where the GPU or CPU is fast in it, else float32."},
    )

    def __post_init__(self):
        """Take an open length from the policy's run, and refuse what cannot be compared (ValueError)."""
        for name in ("model_name_or_path", "ref_model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; needed are a policy, its reference and an output folder")
        if self.max_length is None:
            self.max_length = int(read_run_config(self.model_name_or_path).get("max_length") or 128)
        for name, least in (("max_length", 4), ("num_prompts", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

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

    def trained_share(self, texts: Dataset) -> float | None:
        """The share of rows whose prompt the policy was trained on, None where that is not known."""
        return trained_share(self.model_name_or_path, texts)


@dataclass
class EvaluateArguments(RowArguments, ComparedModels):
    """How to compare them."""

    beta: float | None = field(
        default=None, metadata={"help": "β of implicit reward and loss; by default the policy run's own, or 0.1."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits when sampling."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k most likely tokens only; 0: from all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this mass; 1: from all."})

    def __post_init__(self):
        """Take β too from the policy's run, and refuse what cannot be measured (ValueError)."""
        super().__post_init__()
        if self.beta is None:
            self.beta = float(read_run_config(self.model_name_or_path).get("beta") or 0.1)
        self.row_length = row_length_for(self.max_length, self.row_length) if self.shared_prefix else None
        if not (self.beta > 0 and self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                "beta and temperature must be above 0, top_k at least 0 and top_p between 0 and 1, "
                f"got {self.beta}, {self.temperature}, {self.top_k} and {self.top_p}"
            )
