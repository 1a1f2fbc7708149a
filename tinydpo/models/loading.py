"""A checkpoint's model and tokenizer, from a folder or the Hub: safetensors only, and no code of its own."""

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.models import loading as adapters
from tinydpo.models.hub import download_files, explain_load_errors, retry_hub
from tinydpo.models.precision import set_compute_dtype

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model; code that it brings along runs only on request.

    Raises:
        UserError: if it cannot be loaded, or has no end token (then no answer could ever end).
    """
    from transformers import AutoTokenizer

    if not name:
        raise UserError("model_name_or_path is not set; give a Hub id or a local folder")
    with explain_load_errors("model", name, revision):
        folder = Path(name)
        if not folder.exists():
            # The files first: AutoTokenizer takes a failed request for a file that is not there, and without
            # config.json it may return a tokenizer of another type.
            patterns = [*TOKENIZER_FILES, *["*.py"] * trust_remote_code]
            folder = download_files(name, revision, allow_patterns=patterns, ignore_patterns="*/*")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer.name_or_path = name
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no end token (eos_token); add one and save it again")
    return tokenizer


def find_differing_tokens(one: Any, other: Any) -> list[str]:
    """The tokens that two tokenizers do not both have under the same id, sorted."""
    return sorted({token for token, _ in one.get_vocab().items() ^ other.get_vocab().items()})


def check_same_vocabulary(policy: Any, ref: Any) -> None:
    """Log-probs of the same token ids can be compared only where the ids mean the same tokens.

    Args:
        policy: its tokenizer.
        ref: the reference's.

    Raises:
        UserError: the two vocabularies differ.
    """
    if differ := find_differing_tokens(policy, ref):
        raise UserError(
            f"policy and reference have different vocabularies ({len(differ)} tokens differ, such as {differ[0]!r}); "
            "pass as --ref_model_name_or_path a model of the policy's vocabulary, such as the one it was trained from"
        )


def load_pretrained(
    architecture: Any, name: str, revision: str | None, device: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Load a model in float32 and eval mode, and transformers' report of missing and unexpected weights.

    Args:
        architecture: an auto class of transformers.
        name: Hub id or local folder.
        revision: commit, tag or branch on the Hub.
        device: torch device, the CPU by default.

    Raises:
        UserError: if it cannot be loaded.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading: it only flashes by
    with explain_load_errors("model", name, revision):
        model, loading = retry_hub(
            lambda: architecture.from_pretrained(
                name, revision=revision or "main", dtype=torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )
        )  # fmt: skip
    return model.to(device or "cpu").eval(), loading


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
    if with_tokenizer and (
        differ := find_differing_tokens(load_tokenizer(str(folder)), load_tokenizer(base, revision))
    ):
        raise UserError(
            f"base {base} has another vocabulary than adapter {folder} (token {differ[0]!r} differs); pass the "
            "base that it was trained on"
        )


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
