"""The folder of one training run: which files it holds, and what is in them."""

import errno
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tinydpo.files import read_json, read_yaml

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a mount without a lock manager, as some NFS are


class RunFolder:
    """A run's folder, such as `runs/gpt2-medium-hh/dpo`; each of its files may be missing.

    `results_file` is written last: a run that has it and its weights is finished. What is read from a missing file is
    empty.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "run_config.yaml"  # every setting of the run
        self.summary_file = self.path / "data_summary.json"  # what fitting did to each split
        self.environment_file = self.path / "environment.json"  # versions, device, digests of the starting weights
        self.state_file = self.path / "trainer_state.json"  # transformers' log
        self.results_file = self.path / "train_results.json"  # the final metrics
        self.card_file = self.path / "README.md"
        self.curves_file = self.path / "curves.png"
        self.lock_file = self.path / ".lock"

    @classmethod
    def of_model(cls, model: str | Path) -> "RunFolder":
        """The run that made a local model: the model's own folder, or for a checkpoint the folder above."""
        run = cls(model)
        if run.path.name.startswith("checkpoint-") and not run.is_started:
            return cls(run.path.parent)
        return run

    @property
    def is_started(self) -> bool:
        return self.config_file.is_file()

    @property
    def is_finished(self) -> bool:
        return self.results_file.is_file() and any(self.path.glob("*.safetensors"))

    def lock(self) -> AbstractContextManager:
        """Hold the folder while this process lives, however it ends (filelock.Timeout: another one trains into it)."""
        try:
            return FileLock(self.lock_file, timeout=0, fallback_to_soft=False).acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return nullcontext()

    @property
    def is_locked(self) -> bool:
        """Whether a process on this machine trains into the folder."""
        try:
            with self.lock():
                return False
        except OSError as error:  # or it cannot be written to
            return isinstance(error, Timeout)

    def read_config(self) -> dict[str, Any]:
        return read_yaml(self.config_file) if self.is_started else {}

    def read_summary(self) -> dict[str, Any]:
        return read_json(self.summary_file)

    def read_environment(self) -> dict[str, Any]:
        return read_json(self.environment_file)

    def read_results(self) -> dict[str, Any]:
        return read_json(self.results_file)

    def read_log(self) -> list[dict[str, Any]]:
        """What the trainer logged, in order."""
        return read_json(self.state_file).get("log_history", [])


def was_trained_on_chat(model: str) -> bool | None:
    """Whether a chat template wrote most rows that `model` was trained on; None if no run recorded it."""
    rows = RunFolder.of_model(model).read_summary().get("train", {})
    return is_chat_data(rows) if "templated" in rows else None


def is_chat_data(rows: dict[str, Any]) -> bool:
    """Whether a chat template wrote most rows of a split, by its summary."""
    return 2 * rows["templated"] > rows["pairs_in"]
