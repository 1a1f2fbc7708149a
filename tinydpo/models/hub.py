"""Files from the Hugging Face Hub, and one sentence for each way in which loading fails.

Retries, timeouts and the offline switch are those of the Hub's clients: HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_OFFLINE.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinydpo.errors import UserError, is_disk_full, iter_causes

OFFLINE_HINT = "check the name and the network, give a local path, or run `make quickstart`, which needs neither"


@contextmanager
def explain_load_errors(
    kind: str, name: str, revision: str | None, also: tuple[type[Exception], ...] = (ValueError, KeyError)
) -> Iterator[None]:
    """Turn what the libraries raise while they load a "model" or a "dataset" into a `UserError`.

    `also` are errors to turn besides those of files, networks and the Hub.
    """
    import httpx2  # huggingface_hub's client; some of its errors are not wrapped
    import safetensors

    try:
        yield
    except (httpx2.HTTPError, safetensors.SafetensorError, OSError, *also) as error:
        if is_disk_full(error) or getattr(error, "filename", None):
            raise  # of a file that cannot be read or written, which is named
        raise UserError(_explain(error, kind, name, revision)) from None


def _explain(error: Exception, kind: str, name: str, revision: str | None) -> str:
    import huggingface_hub.errors as hub
    import safetensors

    causes = list(iter_causes(error))

    def caused_by(*types: type) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if caused_by(hub.GatedRepoError):
        return f"{kind} {name} is gated: accept its terms on the Hub and log in with `hf auth login`"
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError) and not Path(name).exists():
        # What cannot be a Hub id, such as runs/recipe/sft, was meant as a path.
        advice = OFFLINE_HINT
        if kind == "model" and caused_by(hub.HFValidationError):
            advice = f"check the name, or train it first: {get_make_command(name)}"
        return f"there is no {kind} {name!r} on the Hub and no such local path; {advice}"
    if caused_by(hub.RevisionNotFoundError):
        return f"{kind} {name} has no revision {revision!r}; check --{kind}_revision"
    if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        return f"{kind} {name} is not in the cache and the Hub cannot be reached; {OFFLINE_HINT}"
    if caused_by(safetensors.SafetensorError):
        return f"{kind} {name}: a weights file is cut or damaged ({error}); download or save it again"
    if "trust_remote_code" in str(error):
        return f"{kind} {name} needs its own code, which only training runs, with --trust_remote_code true"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    advice = "check its files (weights must be safetensors)" if Path(name).exists() else OFFLINE_HINT
    return f"{kind} {name} could not be loaded ({reason}); {advice}"


def get_make_command(model: str) -> str:
    """The command that makes a local model such as runs/gpt2-medium-hh/dpo-512; without a recipe all of them."""
    path = Path(model)
    recipe = Path("recipes", path.parent.name, f"{path.name}.yaml")
    if path.parent.name == "quickstart" or not recipe.parent.is_dir():
        return "`make sft`, `make dpo`, `make reward` or `make quickstart`"
    target = path.name.split("-")[0]
    if path.name.endswith("-merged"):
        return f"`make merge RECIPE={recipe.parent} NAME={path.name.removesuffix('-merged')}`"
    if not recipe.is_file() or target not in ("sft", "dpo", "reward"):
        return f"`make dpo RECIPE={recipe.parent} NAME={path.name}`"
    stage = "" if path.name == target else f" STAGE={path.name}"
    return f"`make {target} RECIPE={recipe.parent}{stage}`"


def download_dataset(name: str, revision: str | None, data_dir: str | None, suffixes: Sequence[str]) -> Path:
    """Download a dataset repository's README and files of these suffixes; returns the local folder (Hub's cache)."""
    from huggingface_hub import snapshot_download

    folder = f"{data_dir.rstrip('/')}/" if data_dir else ""
    patterns = ["README.md", *(f"{folder}*{suffix}" for suffix in suffixes)]
    with explain_load_errors("dataset", name, revision):
        return Path(snapshot_download(name, revision=revision, repo_type="dataset", allow_patterns=patterns))
