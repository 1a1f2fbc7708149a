"""The folder of one training run: which files it holds, and what they say."""

from pathlib import Path
from typing import Any

import yaml

from tinydpo.errors import UserError
from tinydpo.files import read_json


class RunFolder:
    """A run's folder, such as `runs/gpt2-medium-hh/dpo`; every file may be missing.

    `config_file` holds every setting of the run, `summary_file` what fitting did to each split, `environment_file` the
    versions, the device and digests of the starting weights, `state_file` transformers' log, `card_file` the model
    card. `results_file` holds the final metrics and is written last: a run that has it is finished.
    """

    def __init__(self, path: str | Path):
        """Nothing is read or written yet."""
        self.path = Path(path)
        self.config_file = self.path / "run_config.yaml"
        self.summary_file = self.path / "data_summary.json"
        self.environment_file = self.path / "environment.json"
        self.state_file = self.path / "trainer_state.json"
        self.results_file = self.path / "train_results.json"
        self.card_file = self.path / "README.md"
        self.curves_file = self.path / "curves.png"
        self.lock_file = self.path / ".lock"

    @classmethod
    def of_model(cls, model: str | Path) -> "RunFolder":
        """The run that made a local model: the model's own folder, or for a checkpoint the folder above."""
        folder = cls(model)
        if folder.path.name.startswith("checkpoint-") and not folder.config_file.is_file():
            return cls(folder.path.parent)
        return folder

    @property
    def is_started(self) -> bool:
        """Whether a run began here."""
        return self.config_file.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether a run ended here."""
        return self.results_file.is_file()

    def read_config(self) -> dict[str, Any]:
        """Every setting of the run, or {} (UserError: the file is damaged)."""
        if not self.config_file.is_file():
            return {}
        try:
            return yaml.safe_load(self.config_file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{self.config_file} is not valid YAML: {error}") from None

    def read_summary(self) -> dict[str, Any]:
        """What fitting did to each split, or {}."""
        return read_json(self.summary_file)

    def read_environment(self) -> dict[str, Any]:
        """Versions, device and digests, or {}."""
        return read_json(self.environment_file)

    def read_results(self) -> dict[str, Any]:
        """The final metrics, or {}."""
        return read_json(self.results_file)

    def read_log(self) -> list[dict[str, Any]]:
        """What the trainer logged, in order."""
        return read_json(self.state_file).get("log_history", [])
