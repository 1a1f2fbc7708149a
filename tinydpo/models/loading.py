"""The one way to a policy or a reference model: a plain checkpoint, or a LoRA adapter put into its base."""

from typing import Any

from tinydpo.models import adapters
from tinydpo.models.precision import set_compute_dtype
from tinydpo.models.pretrained import load_pretrained


def load_model(name: str, revision: str | None = None, dtype: Any = None, device: Any = None) -> Any:
    """Load a causal language model, or a LoRA adapter merged into its base, in eval mode, its weights in float32.

    Args:
        name: Hub id or local folder.
        revision: commit, tag or branch on the Hub.
        dtype: torch dtype that its blocks compute in, float32 by default; the LM head computes in float32.
        device: torch device, the CPU by default.

    Raises:
        UserError: if it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if adapter := adapters.find_adapter(name, revision):
        model = adapters.merge_adapter(adapter).to(device=device)
    else:
        model, _ = load_pretrained(AutoModelForCausalLM, name, revision, device=device)
    return set_compute_dtype(model, dtype or torch.float32)
