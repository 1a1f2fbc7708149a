"""What a policy has learned against its reference: what to compare, and where it goes.

`logps` and `sampling` ask the models, `metrics` does the arithmetic, `evaluation_table` words it, and
`scripts/evaluate.py` puts them together.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tinydpo.data.trained import trained_share
from tinydpo.evaluation.answering import PolicyArguments, SamplingArguments
from tinydpo.files import read_run_config
from tinydpo.launching.arguments import RowArguments, resolve_row_length
from tinydpo.models.pretrained import check_same_vocabulary, load_tokenizer


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

    def trained_share(self, texts: Dataset) -> float | None:
        """The share of rows whose prompt the policy was trained on, None where that is not known."""
        return trained_share(self.model_name_or_path, texts)


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
