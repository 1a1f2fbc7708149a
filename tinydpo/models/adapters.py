"""Adapters (LoRA) and quantized bases: what a training loads, and an adapter put into its base's weights.

An adapter is small because it says nothing of its base: on other weights it loads without a word and answers
nonsense. So a run records which weights it started from, and everything here that could be told is refused.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.models.hub import retry_hub, explain_load_errors
from tinydpo.models.pretrained import find_differing_tokens, load_pretrained, load_tokenizer

ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class MergeArguments:
    """Which adapter, and where the plain checkpoint goes."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The adapter: folder or Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch, on the Hub."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Its base, in full precision; by default the one that the adapter names."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "A new or empty folder for the checkpoint."})

    def __post_init__(self):
        """Refuse what cannot be meant (ValueError)."""
        for name in ("model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; needed are an adapter and a new folder")
        folder = Path(self.output_dir)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ValueError(f"output_dir {folder} exists and is not empty; choose a new folder")


def get_adapter_kwargs(model_args: Any) -> dict[str, Any]:
    """What TRL's trainers take for a `ModelConfig`: `quantization_config` and `peft_config`, None if not asked for.

    Loading a quantized model after this is safe on every CPU. On those with AVX512-BF16, bitsandbytes repacks a 4-bit
    layer for inference at its first forward in eval mode without gradients (the reference pass, an evaluation), and
    nothing flows back through it from then on.

    Raises:
        UserError: the model is itself an adapter, which TRL cannot load.
    """
    from trl import get_peft_config, get_quantization_config

    name = model_args.model_name_or_path
    refuse_adapter(name, "training starts from a plain checkpoint", "start from that folder")
    quantization, peft = get_quantization_config(model_args), get_peft_config(model_args)
    if quantization is not None:
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # asked by each layer as it is made
    if peft is not None:
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it for GPT-2 by itself
        if not Path(name).exists():
            peft.revision = model_args.model_revision  # or the adapter would name its base without it
    return {"quantization_config": quantization, "peft_config": peft}


def refuse_adapter(name: str, needed: str, instead: str) -> None:
    """Refuse a local adapter where TRL would load a model (UserError that says how to make one of it)."""
    if (Path(name) / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{name} is an adapter, and {needed}: put it into its base's weights with "
            f"`scripts/merge.py --model_name_or_path {name} --output_dir {name}-merged`, and {instead}"
        )


def record_base_weights(resolved: dict[str, Any]) -> dict[str, str]:
    """For a run's `environment.json`: which weights of a local folder it starts from.

    Empty for the Hub, where revisions say it, and for a quantized folder, whose weights are not those to merge an
    adapter into.
    """
    folder = Path(resolved["model_name_or_path"])
    if not folder.is_dir() or "quantization_config" in (folder / "config.json").read_text():
        return {}
    return {"base_sha256": hash_weights(folder)}


def hash_weights(folder: Path) -> str:
    """One digest of a folder's safetensors files."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def find_adapter(name: str, revision: str | None = None) -> Path | None:
    """The local folder of an adapter, downloaded if need be; None where `name` is something else.

    Raises:
        UserError: its weights are not safetensors.
    """
    from transformers.utils import cached_file, find_adapter_config_file

    with explain_load_errors("model", name, revision):
        config = retry_hub(lambda: find_adapter_config_file(name, revision=revision))
        if config is None:
            return None
        there = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        weights = retry_hub(lambda: cached_file(name, WEIGHTS, **there))
    if weights is None:
        raise UserError(f"adapter {name} has no {WEIGHTS}; pickled weights are not read, save it again as safetensors")
    return Path(config).parent


def merge_adapter(folder: Path, base: str | None = None) -> Any:
    """A base model with an adapter's change added to its weights: a plain model, whose outputs are the adapter's.

    Args:
        folder: an adapter's, with its weights in safetensors.
        base: folder or Hub id of the base; by default the one that the adapter names.

    Returns:
        The model in float32 on the CPU, in eval mode.

    Raises:
        UserError: the adapter is no LoRA, or does not belong on this base: quantized, of other shapes or another
            vocabulary, or trained again since.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter {folder} is of type {config.get('peft_type')}; only LORA goes into a base's weights")
    base = base or config["base_model_name_or_path"]
    revision = None if base != config["base_model_name_or_path"] else config.get("revision")
    _check_base(folder, base, revision)
    model, _ = load_pretrained(AutoModelForCausalLM, base, revision)
    wrong = f"adapter {folder} does not fit the base {base}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # peft's own use of old names, and of what is held against each other below
            model = PeftModel.from_pretrained(model, folder)
        ours, theirs = get_peft_model_state_dict(model), load_file(folder / WEIGHTS)
        if set(ours) != set(theirs):
            name = min(set(ours) ^ set(theirs))
            raise UserError(f"{wrong}: only one of the two has {name}; pass the base that it was trained on")
        return model.merge_and_unload(safe_merge=True).eval()
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{wrong} ({reason}); pass the base that it was trained on") from None


def _check_base(folder: Path, base: str, revision: str | None) -> None:
    """Refuse a base by what can be told without its weights."""
    from transformers import AutoConfig

    with explain_load_errors("model", base, revision):
        config = retry_hub(
            lambda: AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=False)
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"base {base} is quantized; merge adapter {folder} into the same weights in full precision")
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    record = json.loads((run / "environment.json").read_text()) if (run / "environment.json").is_file() else {}
    known = record.get("base_sha256")
    if known and Path(base).is_dir() and known != hash_weights(Path(base)):
        raise UserError(f"base {base} has other weights than adapter {folder} was trained on: train the adapter again")
    with_tokenizer = (folder / "tokenizer_config.json").is_file()
    if with_tokenizer and (differ := find_differing_tokens(load_tokenizer(str(folder)), load_tokenizer(base, revision))):
        raise UserError(
            f"base {base} has another vocabulary than adapter {folder} (token {differ[0]!r} differs); pass the "
            "base that it was trained on"
        )
