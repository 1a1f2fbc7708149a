"""Models, tokenizers and data sets from the Hub: safetensors only, no remote code, one sentence when it fails."""

import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tinydpo.errors import UserError, causes, disk_full

Loaded = TypeVar("Loaded")
ATTEMPTS, FIRST_PAUSE = 4, 1.0  # 1 + 2 + 4 s of patience: the clients do not retry a 503 on a file by themselves
LONG = 15.0  # seconds after which nothing is tried again: what the clients do retry takes them 23 s
PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")  # of an address such as http://user:password@host
INSTEAD = "check the name and the network, give a local path, or run `make quickstart`, which needs neither"
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def patiently(load: Callable[[], Loaded]) -> Loaded:
    """Call `load`, again after a cut connection and 429 and 5xx answers of the Hub, a bounded number of times."""
    import httpx2  # what huggingface_hub speaks through, and lets some errors of come out as they are

    start = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return load()
        except Exception as error:
            passing = _busy(error) or any(isinstance(one, httpx2.TransportError) for one in causes(error))
            if attempt == ATTEMPTS - 1 or not passing or time.monotonic() - start > LONG:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _busy(error: BaseException) -> int:
    """The Hub's 429 or 5xx behind an error, or 0."""
    statuses = (getattr(getattr(one, "response", None), "status_code", 0) for one in causes(error))
    return next((status for status in statuses if status == 429 or status >= 500), 0)


@cache
def bound_waits() -> None:
    """Put an end to every wait of the clients: some of their requests have no timeout, one takes 60 s six times, and
    they sleep for as long as an answer's `Retry-After` says. `HF_HUB_DOWNLOAD_TIMEOUT` holds for all (10 s)."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def end_silence(request: Any) -> None:
        if request.method in ("GET", "HEAD"):  # the answer to a large upload may take its time
            most, asked = constants.HF_HUB_DOWNLOAD_TIMEOUT, request.extensions.get("timeout", {})
            waits = {kind: min(asked.get(kind) or most, most) for kind in ("connect", "read", "write", "pool")}
            request.extensions = {**request.extensions, "timeout": waits}

    def ask_sooner(response: Any) -> None:
        for name in ("retry-after", "ratelimit"):
            seconds = re.findall(r"(?:^|t=)(\d+)", response.headers.get(name, ""))
            if max(map(int, seconds), default=0) > LONG:
                del response.headers[name]

    def client() -> Any:
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks["request"], end_silence],
            "response": [*hooks["response"], ask_sooner],
        }
        return made

    set_client_factory(client)


@cache
def unreachable() -> str:
    """Why the Hub cannot be reached, or "". Its clients then use the cache alone: a call would try for half a minute.

    Whatever answers, be it with an error, is reached; a proxy is used as for every other request.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for pause in (0, 1, 2):
        time.sleep(pause * FIRST_PAUSE)
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
            return ""
        except Exception as error:  # of an HTTP library that is the clients' own affair
            reason = str(error) or type(error).__name__
    constants.HF_HUB_OFFLINE = True
    return reason


@contextmanager
def told_plainly(what: str, name: str, revision: str | None, also: tuple = (ValueError, KeyError)) -> Any:
    """Turn whatever the Hub's clients, and `also`, raise while loading into one sentence."""
    import httpx2
    import huggingface_hub.errors as hub
    import safetensors
    from huggingface_hub import constants

    for module in ("utils._http", "file_download"):  # they tell of every retry, with the whole address
        logging.getLogger(f"huggingface_hub.{module}").setLevel(logging.ERROR)
    bound_waits()
    local = Path(name).exists()
    at = f" at revision {revision}" if revision and revision != "main" and not local else ""
    away = "" if local else unreachable()
    try:
        yield
    except UserError:
        raise
    except (httpx2.HTTPError, hub.HFValidationError, safetensors.SafetensorError, OSError, *also) as error:
        if disk_full(error):
            raise
        came_of = tuple(causes(error))

        def caused_by(*kinds: type) -> bool:
            return any(isinstance(one, kinds) for one in came_of)

        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if caused_by(hub.GatedRepoError):
            told = f"{what} {name}{at} is gated: accept its terms on the Hub and log in with `hf auth login`"
        elif caused_by(hub.RepositoryNotFoundError, hub.HFValidationError) and not local:
            told = f"there is no {what} {name!r} on the Hub and no such local path; {INSTEAD}"
        elif caused_by(hub.RevisionNotFoundError):
            told = f"{what} {name} has no revision {revision!r}; check --{what}_revision"
        elif "trust_remote_code" in str(error):
            told = f"{what} {name}{at} brings code of its own, which is not run; read it first, and pass "
            told += "--trust_remote_code true to sft.py or dpo.py if you trust it"
        elif caused_by(safetensors.SafetensorError):
            told = f"{what} {name}: a weights file is cut or damaged ({error}); download or save it again"
        elif away and caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
            told = (
                f"{what} {name}{at} is not in the cache and {constants.ENDPOINT} cannot be reached ({away}); {INSTEAD}"
            )
        elif status := _busy(error):
            told = f"{what} {name}{at} could not be loaded (the Hub answers {status}); try again later, or {INSTEAD}"
        elif not local and caused_by(json.JSONDecodeError):
            told = f"{what} {name}{at} could not be loaded ({constants.ENDPOINT} answers, but not as a Hub does: is "
            told += f"there a proxy or a login page in between?); {INSTEAD}"
        else:
            told = f"{what} {name}{at} could not be loaded ({reason}); {INSTEAD}"
        raise UserError(PASSWORD.sub("", told)) from None


def download_dataset(name: str, revision: str | None, data_dir: str | None) -> Path:
    """Download a dataset repository's JSON and Parquet files and return the local folder (the Hub's cache).

    Raises:
        UserError: if it is not there, or the Hub does not answer.
    """
    inside = f"{data_dir}/" if data_dir else ""
    suffixes = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
    patterns = ["README.md", *(f"{inside}*{suffix}" for suffix in suffixes)]
    with told_plainly("dataset", name, revision):
        return _download(name, revision, repo_type="dataset", allow_patterns=patterns)


def _download(name: str, revision: str | None, **which: Any) -> Path:
    from huggingface_hub import snapshot_download

    return Path(patiently(lambda: snapshot_download(name, revision=revision, **which)))


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model; code that it brings along runs only on request.

    Raises:
        UserError: if it cannot be loaded, or has no end token (then no answer could ever end).
    """
    from transformers import AutoTokenizer

    if not name:
        raise UserError("model_name_or_path is not set; give a Hub id or a local folder")
    with told_plainly("model", name, revision):
        folder = Path(name)
        if not folder.exists():
            # The files first: AutoTokenizer takes a failed request for a file that is not there, and without
            # config.json it may return a tokenizer of another type.
            patterns = [*TOKENIZER_FILES, *["*.py"] * trust_remote_code]
            folder = _download(name, revision, allow_patterns=patterns, ignore_patterns="*/*")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer.name_or_path = name
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no end token (eos_token); add one and save it again")
    return tokenizer


def differing_tokens(one: Any, other: Any) -> list[str]:
    """The tokens that two tokenizers do not both have under the same id, sorted."""
    return sorted({token for token, _ in one.get_vocab().items() ^ other.get_vocab().items()})


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

    from tinydpo import adapters

    if adapter := adapters.find(name, revision):
        return adapters.merged(adapter).to(dtype=dtype, device=device)
    return load_as(AutoModelForCausalLM, name, revision, dtype, device)[0]


def load_as(
    architecture: Any, name: str, revision: str | None, dtype: Any = None, device: Any = None
) -> tuple[Any, dict[str, Any]]:
    """`load_model` for any auto class of transformers; beside the model its report of missing and unexpected weights.

    Raises:
        UserError: if it cannot be loaded.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading: it only flashes by
    with told_plainly("model", name, revision):
        model, loading = patiently(
            lambda: architecture.from_pretrained(
                name, revision=revision or "main", dtype=dtype or torch.float32, use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )
        )  # fmt: skip
    return model.to(device or "cpu").eval(), loading
