"""The Hub's clients with patience that ends: every wait is bounded, and whatever fails is one sentence."""

import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from tinydpo.errors import UserError, is_disk_full, iter_causes

Loaded = TypeVar("Loaded")
ATTEMPTS, FIRST_PAUSE = 4, 1.0  # 1 + 2 + 4 s of patience: the clients do not retry a 503 on a file by themselves
LONG = 15.0  # seconds after which nothing is tried again: what the clients do retry takes them 23 s
PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")  # of an address such as http://user:password@host
INSTEAD = "check the name and the network, give a local path, or run `make quickstart`, which needs neither"
TRAIN_IT = "check the name, or train it first: `make sft`, `make dpo`, `make reward` or `make quickstart`"


def retry_hub(load: Callable[[], Loaded]) -> Loaded:
    """Call `load`, again after a cut connection and 429 and 5xx answers of the Hub, a bounded number of times."""
    import httpx2  # what huggingface_hub speaks through, and lets some errors of come out as they are

    start = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return load()
        except Exception as error:
            passing = _busy(error) or any(isinstance(one, httpx2.TransportError) for one in iter_causes(error))
            if attempt == ATTEMPTS - 1 or not passing or time.monotonic() - start > LONG:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _busy(error: BaseException) -> int:
    """The Hub's 429 or 5xx behind an error, or 0."""
    statuses = (getattr(getattr(one, "response", None), "status_code", 0) for one in iter_causes(error))
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
def explain_load_errors(what: str, name: str, revision: str | None, also: tuple = (ValueError, KeyError)) -> Any:
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
        if is_disk_full(error):
            raise
        came_of = tuple(iter_causes(error))

        def caused_by(*kinds: type) -> bool:
            return any(isinstance(one, kinds) for one in came_of)

        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if caused_by(hub.GatedRepoError):
            told = f"{what} {name}{at} is gated: accept its terms on the Hub and log in with `hf auth login`"
        elif caused_by(hub.RepositoryNotFoundError, hub.HFValidationError) and not local:
            # What cannot be a Hub id, such as runs/recipe/sft, was meant as a path.
            instead = TRAIN_IT if what == "model" and caused_by(hub.HFValidationError) else INSTEAD
            told = f"there is no {what} {name!r} on the Hub and no such local path; {instead}"
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
    with explain_load_errors("dataset", name, revision):
        return download_files(name, revision, repo_type="dataset", allow_patterns=patterns)


def download_files(name: str, revision: str | None, **which: Any) -> Path:
    """Download those files of a repository that `which` picks, and return the local folder (the Hub's cache)."""
    from huggingface_hub import snapshot_download

    return Path(retry_hub(lambda: snapshot_download(name, revision=revision, **which)))
