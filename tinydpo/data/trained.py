"""Which prompts a model was trained on: short hashes in its run's folder, against which evaluation holds its pairs."""

from hashlib import blake2b
from pathlib import Path

from datasets import Dataset

from tinydpo.files import find_run_folder, read_run_config, write_atomic

TRAINED = "trained_prompts.txt"  # a hash a line: 2 MB for HH's 160,800 pairs


def hashes(texts: Dataset) -> list[str]:
    """48 bits of each row's `prompt`, whole as before it was fitted; "" where it has none (SFT rows may)."""
    prompts = (prompt or "" for batch in texts.select_columns("prompt").iter(1000) for prompt in batch["prompt"])
    return [prompt and blake2b(prompt.encode(errors="replace"), digest_size=6).hexdigest() for prompt in prompts]


def write_trained(folder: Path, texts: Dataset) -> None:
    """Write into a run's folder which prompts it trains on."""
    write_atomic(folder / TRAINED, "".join(f"{one}\n" for one in sorted(set(hashes(texts)) - {""})))


def trained_share(model: str, texts: Dataset) -> float | None:
    """The share of rows whose prompt a run's model was trained on, there or in the runs that it began from.

    None where no folder tells: for a model of the Hub, or of runs from before this was written down.
    """
    trained: set[str] = set()
    runs: set[Path] = set()
    while config := read_run_config(model):
        if (run := find_run_folder(model)) in runs:
            break
        runs.add(run)
        if (run / TRAINED).is_file():
            trained.update((run / TRAINED).read_text().split())
        model = config.get("model_name_or_path") or ""
    asked = hashes(texts)
    return sum(one in trained for one in asked) / len(asked) if trained else None
