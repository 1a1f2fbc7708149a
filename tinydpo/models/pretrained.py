"""A checkpoint's model and tokenizer, from a folder or the Hub: safetensors only, and no code of its own."""

from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.models.hub import download_files, retry_hub, explain_load_errors

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


def load_pretrained(architecture: Any, name: str, revision: str | None, device: Any = None) -> tuple[Any, dict[str, Any]]:
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
