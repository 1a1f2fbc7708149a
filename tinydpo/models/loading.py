"""Load models and tokenizers: safetensors only, all of a model's weights, and its own code only in training, if asked.

A LoRA adapter counts as a model: it is merged into its base's weights as it is loaded.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.files import hash_file, read_json
from tinydpo.models.hub import explain_load_errors
from tinydpo.models.precision import set_compute_dtype
from tinydpo.run_folder import RunFolder

TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
ADAPTER_CONFIG = "adapter_config.json"
DIGESTS = {"model_name_or_path": "base_sha256", "ref_model_name_or_path": "ref_sha256"}


def load_model(name: str, revision: str | None = None, dtype: Any = None, device: Any = None) -> Any:
    """Load a causal language model, or a LoRA adapter merged into its base, in eval mode, its weights in float32.

    Args:
        name: Hub id or local folder.
        revision: commit, tag or branch on the Hub.
        dtype: torch dtype that its blocks compute in, float32 by default; the LM head computes in float32.
        device: torch device, the CPU by default.
    """
    import torch
    from transformers import AutoModelForCausalLM

    adapter = find_adapter(name, revision)
    if adapter:
        model = merge_adapter(adapter).to(device=device)
    else:
        model = load_pretrained(AutoModelForCausalLM, name, revision).to(device=device)
    return set_compute_dtype(model, dtype or torch.float32)


def load_pretrained(
    architecture: Any, name: str, revision: str | None, device_map: Any = None, trust_remote_code: bool = False
) -> Any:
    """Load a model in float32 and eval mode; `architecture` is one of transformers' auto classes.

    A model without all of its weights is a UserError: transformers would draw the missing ones at random.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and writing shards, over in a moment
    logging.get_logger("transformers.modeling_utils").addFilter(_is_no_load_report)
    with explain_load_errors("model", name, revision):
        _check_shards(name, revision)
        model, report = architecture.from_pretrained(
            name, revision=revision or "main", dtype=torch.float32, device_map=device_map, use_safetensors=True,
            trust_remote_code=trust_remote_code, output_loading_info=True,
        )  # fmt: skip
    saved_as = (model.config.architectures or [""])[0]
    if architecture is AutoModelForCausalLM and saved_as.endswith("ForSequenceClassification"):
        raise UserError(f"{name} is a reward model ({saved_as}), not a language model; pass one of those")
    missing = sorted(report["missing_keys"])
    if missing:
        kind = type(model).__name__
        raise UserError(f"model {name} lacks {missing[0]}, which {kind} needs; pass a whole model of this kind")
    return model.eval()


def _is_no_load_report(record: Any) -> bool:
    """Hide transformers' table of missing weights, which are refused, and of superfluous ones, which do no harm."""
    return "LOAD REPORT" not in record.getMessage()


def _check_shards(name: str, revision: str | None) -> None:
    """Refuse an index that names other files than safetensors beside it: transformers would unpickle them."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    except OSError:  # there is none: one file holds all weights, or loading will say what is wrong
        return
    for shard in read_json(Path(index), "weight_map")["weight_map"].values():
        if not shard.endswith(".safetensors") or shard != Path(shard).name:
            raise UserError(
                f"model {name}: {SAFE_WEIGHTS_INDEX_NAME} names {shard}, which is not a safetensors file in the same "
                "folder"
            )


def check_model(
    name: str, revision: str | None, tokenizer: Any, max_length: int, architecture: Any = None, trust: bool = False
) -> Any:
    """Refuse a model, or an adapter's base, that lacks weights, positions or embeddings; returns it as shapes alone.

    `architecture` is the auto class that will load it, by default a causal language model's; `trust` runs its code.
    """
    from peft import PeftConfig
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    folder = find_adapter(name, revision)
    if folder:
        adapter = PeftConfig.from_pretrained(folder)
        name = adapter.base_model_name_or_path
        revision = adapter.revision
    with explain_load_errors("model", name, revision):
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust)
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"max_length is {max_length}, but model {name} has {positions} positions; lower --max_length")
    tokens = text_config.vocab_size
    if len(tokenizer) > tokens:
        raise UserError(f"model {name} embeds {tokens} tokens, its tokenizer has {len(tokenizer)}; they do not match")
    needs_values = is_deepspeed_zero3_enabled() or hasattr(config, "quantization_config")
    device_map = None if needs_values else "meta"  # shapes only
    return load_pretrained(architecture or AutoModelForCausalLM, name, revision, device_map, trust)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model (UserError: it cannot be loaded, or has no end token)."""
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    if not name:
        raise UserError("model_name_or_path is not set; give a Hub id or a local folder")
    check_run(RunFolder(name))
    with explain_load_errors("model", name, revision):
        folder = name
        if not Path(name).exists():
            # AutoTokenizer takes a failed request for a file that does not exist, and without config.json it may
            # return a tokenizer of the wrong type. So the files are downloaded first.
            patterns = [*TOKENIZER_FILES, "*.py"] if trust_remote_code else TOKENIZER_FILES
            folder = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer.name_or_path = name
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no end token (eos_token); add one and save it again")
    return tokenizer


def apply_tokenizer_flags(tokenizer: Any, args: Any) -> None:
    """Give a tokenizer the end token and the chat template that SFT's flags name."""
    eos_token = getattr(args, "eos_token", None)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"eos_token is {eos_token!r}, which is not a token of {tokenizer.name_or_path}; name one that is"
            )
        tokenizer.eos_token = eos_token
    template = getattr(args, "chat_template_path", None)
    if template is not None:
        if not Path(template).is_file() or Path(template).suffix not in (".jinja", ".j2"):
            raise UserError(
                f"chat_template_path is {template}; give a .jinja or .j2 file (another model's folder has "
                "chat_template.jinja), whose special tokens the model must know, as they are not added"
            )
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")


def check_run(run: RunFolder) -> None:
    """Refuse the folder of a run without its model: it trains, was stopped, or has no weights (UserError)."""
    from transformers.trainer_utils import get_last_checkpoint

    if not run.is_started or run.is_finished:
        return
    checkpoint = get_last_checkpoint(run.path)
    alternative = f", or pass {checkpoint}" if checkpoint else ""
    if run.is_locked:
        raise UserError(f"{run.path} is still training; wait until it has finished{alternative}")
    state = "has no weights file (*.safetensors)" if run.results_file.is_file() else "was stopped"
    raise UserError(f"{run.path} {state}; rerun the command that started it{alternative}")


def check_same_vocabulary(policy: Any, ref: Any) -> None:
    """Refuse tokenizers with different vocabularies, whose models' log-probs cannot be compared (UserError)."""
    differing = sorted({token for token, _ in policy.get_vocab().items() ^ ref.get_vocab().items()})
    if differing:
        raise UserError(
            f"policy and reference have different vocabularies ({len(differing)} tokens differ, such as "
            f"{differing[0]!r}); pass as --ref_model_name_or_path a model of the policy's vocabulary, such as the one "
            "it was trained from"
        )


def find_adapter(name: str, revision: str | None = None) -> Path | None:
    """The local folder of an adapter, downloaded if need be; None where `name` is something else."""
    from transformers.utils import cached_file, find_adapter_config_file

    check_run(RunFolder(name))
    with explain_load_errors("model", name, revision):
        config = find_adapter_config_file(name, revision=revision)
        if config is None:
            return None
        cached_file(name, "adapter_model.safetensors", revision=revision)  # pickled weights are not read
    return Path(config).parent


def merge_adapter(folder: Path, base: str | None = None) -> Any:
    """A base model with an adapter added to its weights: a plain model, in float32 on the CPU and in eval mode.

    Args:
        folder: an adapter's, with its weights in safetensors.
        base: folder or Hub id of the base; by default the one that the adapter names.

    Raises:
        UserError: the base is quantized, or has different weights from those that the adapter was trained on.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    adapter = PeftConfig.from_pretrained(folder)
    own_base = adapter.base_model_name_or_path
    base = base or own_base
    recorded = RunFolder.of_model(folder).read_environment().get("base_sha256")
    if recorded and Path(base).is_dir() and recorded != hash_weights(Path(base)):
        raise UserError(
            f"base {base} has different weights from those that adapter {folder} was trained on; train the adapter "
            "again"
        )
    model = load_pretrained(AutoModelForCausalLM, base, adapter.revision if base == own_base else None)
    if getattr(model.config, "quantization_config", None):
        raise UserError(f"base {base} is quantized; merge adapter {folder} into the same weights in full precision")
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft uses transformers' older names
        return PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True).eval()


def refuse_adapter(name: str) -> None:
    """Refuse a local adapter where TRL would load a model (UserError that says how to merge it)."""
    if (Path(name) / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{name} is an adapter, and training takes plain checkpoints: merge it into its base with "
            f"`scripts/merge.py --model_name_or_path {name} --output_dir {name}-merged`, and pass that folder"
        )


def get_adapter_kwargs(model_args: Any) -> dict[str, Any]:
    """`quantization_config` and `peft_config` for TRL's trainers, as a `ModelConfig` asks for them, or None.

    Loading a quantized model after this is safe on every CPU. On those with AVX512-BF16, bitsandbytes repacks a 4-bit
    layer for inference at its first forward in eval mode without gradients (the reference pass, an evaluation), after
    which its gradients are silently zero.
    """
    from trl import get_peft_config, get_quantization_config

    name = model_args.model_name_or_path
    if isinstance(model_args.lora_target_modules, str) and model_args.lora_target_modules != "all-linear":
        # TRL makes a text of a list of one, which peft would take for a pattern of the layer's whole name.
        model_args.lora_target_modules = [model_args.lora_target_modules]
    quantization_config = get_quantization_config(model_args)
    peft_config = get_peft_config(model_args)
    if quantization_config is not None:
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # each layer asks when it is made
    if peft_config is not None:
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft sets it for GPT-2 by itself
        if not Path(name).exists():
            peft_config.revision = model_args.model_revision  # or the adapter would name its base without it
    return {"quantization_config": quantization_config, "peft_config": peft_config}


def hash_start_weights(settings: dict[str, Any]) -> dict[str, str]:
    """For a run's `environment.json`: digests of the weights in the local folders that it starts from.

    Not of quantized ones: an adapter is merged into the same weights in full precision.
    """
    digests = {}
    for setting, key in DIGESTS.items():
        folder = Path(settings.get(setting) or "none")
        if folder.is_dir() and "quantization_config" not in (folder / "config.json").read_text(encoding="utf-8"):
            digests[key] = hash_weights(folder)
    return digests


def hash_weights(folder: Path) -> str:
    """One digest of a folder's safetensors files."""
    digests = [hash_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
