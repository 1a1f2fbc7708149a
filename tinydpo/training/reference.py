"""A DPO reference other than the model that training starts from, as rounds need it.

Each round starts from the last policy; were that the reference too, KL would be measured from a place that moves.
"""

from pathlib import Path
from typing import Any, NamedTuple

from tinydpo.models.adapters import refuse_adapter, hash_weights
from tinydpo.models.hub import retry_hub, explain_load_errors


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


def load_reference(resolved: dict[str, Any], training: Any, quantization_config: Any = None) -> Any:
    """Such a reference as `DPOTrainer` takes it, loaded as TRL loads the model itself; None without one.

    Args:
        resolved: every key of the run with its value.
        training: transformers' `TrainingArguments`, after `machine.prepare`.
        quantization_config: the model's own, for its reference as well.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import create_model_from_path

    if (reference := find_reference(resolved)) is None:
        return None
    given = {**training.model_init_kwargs, "revision": reference.revision or "main", "device_map": None}
    given |= {"trust_remote_code": training.trust_remote_code}
    given |= {"quantization_config": quantization_config} if quantization_config else {}
    refuse_adapter(reference.name, "a reference is a plain checkpoint", "pass that folder")
    with explain_load_errors("model", *reference):
        return retry_hub(lambda: create_model_from_path(reference.name, AutoModelForCausalLM, **given))


def record_reference_weights(resolved: dict[str, Any]) -> dict[str, str]:
    """For a run's `environment.json`: the weights of such a reference in a local folder; revisions tell the Hub's."""
    reference = find_reference(resolved)
    return {"ref_sha256": hash_weights(Path(reference.name))} if reference and Path(reference.name).is_dir() else {}
