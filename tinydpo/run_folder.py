"""The folder of one training run: which files it holds, and what is in them."""

from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tinydpo.files import read_json, read_yaml


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

    @property
    def is_locked(self) -> bool:
        """Whether a process on this machine trains into the folder."""
        try:
            with FileLock(self.lock_file, timeout=0):
                return False
        except OSError as error:  # or nothing can be locked there
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
