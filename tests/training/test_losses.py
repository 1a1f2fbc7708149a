"""Every loss of TRL, and every row of docs/losses.md, trains through scripts/dpo.py as the table writes it."""

import inspect
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from running import ROOT, log, run
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in PAGE.splitlines() if "| `" in line[:3]
]


def flags_of(cell: str) -> str:
    """What to type: a bare name is a loss."""
    return " ".join(
        text if text.startswith("--") else f"--loss_type {text}" for text in re.findall(r"`([^`]+)`", cell)
    )


FLAGS = {flags_of(row[0]): row[-1] for row in ROWS if "`--loss_type`" not in row[0]}


def in_source(name: str) -> set[str]:
    """The values that TRL's loss compares `name` with."""
    return set(re.findall(rf'{name} == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))


def test_the_page_names_every_loss_of_the_library():
    in_help = set(re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]))
    library = in_source("loss_type")
    assert library == in_help and len(library) >= 15, "TRL's losses cannot be read off its source any more"
    named = {flags.split()[1] for flags in FLAGS if re.match(r"--loss_type \w+( --|$)", flags)}
    assert named == library, f"docs/losses.md lacks {library - named}, or names {named - library} that TRL has not"


def test_the_page_names_every_divergence_of_the_library():
    named = set(re.findall(r"--f_divergence_type (\w+)", PAGE)) | {"reverse_kl"}  # the default
    assert named == in_source("f_divergence_type")


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("losses") / "reference"))


@pytest.mark.parametrize("flags", FLAGS)
def test_a_row_of_the_page_trains(flags: str, reference: Path, task: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("tinydpo.training.curves.draw_curves", lambda *args: None)  # takes longer than the training
    run("dpo", "--model_name_or_path", reference, "--dataset_name", task / "data", "--output_dir", tmp_path / "run",
        "--precompute_ref_log_probs", "true", "--learning_rate", "1e-3", "--max_steps", "2", "--eval_strategy", "no",
        "--save_strategy", "no", "--disable_tqdm", "true", *flags.split())  # fmt: skip
    losses = log(tmp_path / "run", "loss")
    assert len(losses) == 2 and all(map(math.isfinite, losses)), f"the loss is {losses}"
    if FLAGS[flags]:
        assert losses[0] == pytest.approx(float(FLAGS[flags]), abs=6e-4), "the page tells another first loss"
    if "1.8" in flags:
        card = (tmp_path / "run" / "README.md").read_text()
        assert "loss 1.8 sigmoid + -0.8 robust, label smoothing 0.1, beta 0.1" in card, "the card tells another loss"
    before, after = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "run"))
    moved = {name: (after[name] - weight).abs().max() for name, weight in before.items()}
    assert all(map(torch.isfinite, moved.values())), "a weight is not finite any more"
    assert min(moved.values()) > 1e-5, f"{min(moved, key=moved.get)} does not move"
