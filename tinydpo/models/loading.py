"""The one way to a policy or a reference model: a plain checkpoint, or a LoRA adapter put into its base."""

from typing import Any

from tinydpo.models import adapters
from tinydpo.models.pretrained import load_as


def load_model(name: str, revision: str | None = None, dtype: Any = None, device: Any = None) -> Any:
    """Load a causal language model, or a LoRA adapter merged into its base, in eval mode.

    Args:
        name: Hub id or local folder.
        revision: commit, tag or branch on the Hub.
        dtype: torch dtype of the weights, float32 by default.
        device: torch device, the CPU by default.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    if adapter := adapters.find(name, revision):
        return adapters.merged(adapter).to(dtype=dtype, device=device)
    return load_as(AutoModelForCausalLM, name, revision, dtype, device)[0]
