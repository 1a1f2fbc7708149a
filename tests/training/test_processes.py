"""Several processes, through accelerate's launcher and through make."""

import json
import os
import subprocess
from pathlib import Path

import dpo
import psutil
import pytest
import sft
import yaml
from engines import without_clocks
from running import BIN, ROOT, call, log

CONFIG = ROOT / "accelerate_configs/multi_cpu.yaml"


@pytest.fixture
def recipes(task: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with `recipes/mine`: an SFT of six steps, and the DPO that starts from it."""
    common = {
        "dataset_name": str(task / "data"), "max_length": 128, "max_steps": 6, "pairs_per_step": 16,
        "per_device_train_batch_size": 8, "activation_checkpointing": False, "bf16": False, "learning_rate": 1e-3,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no", "report_to": "none",
        "eval_pairs": 17, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    folder = tmp_path / "recipes/mine"
    folder.mkdir(parents=True)
    (folder / "sft.yaml").write_text(yaml.safe_dump(common | {"model_name_or_path": str(tiny_model)}))
    start = {"model_name_or_path": "runs/mine/sft", "precompute_ref_log_probs": True}
    (folder / "dpo.yaml").write_text(yaml.safe_dump(common | start))
    return tmp_path


def command(script: str, *flags: str) -> list[str]:
    launch = [BIN / "accelerate", "launch", "--quiet", "--config_file", CONFIG, ROOT / f"scripts/{script}.py"]
    recipe = ["--config", f"recipes/mine/{script}.yaml", "--accelerate_config", CONFIG]
    return [str(part) for part in (*launch, *recipe, *flags)]


def launch(script: str, folder: Path, *flags: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(script, *flags), cwd=folder, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FutureWarning" not in done.stderr, f"a start prints what a user can do nothing about:\n{done.stderr}"


@pytest.mark.slow
def test_two_processes_train_like_one(recipes: Path, monkeypatch: pytest.MonkeyPatch):
    """DPO and its missing SFT, which both processes train first; of 17 held-out pairs the second evaluates fewer."""
    launch("dpo", recipes)
    monkeypatch.chdir(recipes)
    sft.main(["--config", "recipes/mine/sft.yaml", "--output_dir", "runs/one/sft"])
    dpo.main(["--config", "recipes/mine/dpo.yaml", "--model_name_or_path", "runs/one/sft", "--output_dir",
              "runs/one/dpo"])  # fmt: skip
    for stage in ("sft", "dpo"):
        one, two = Path("runs/one", stage), Path("runs/mine", stage)
        results = json.loads((two / "train_results.json").read_text())
        metrics = {key for key in without_clocks(results) if key.startswith("eval_")}
        for key in {"loss", "grad_norm", "eval_loss"} | metrics:
            expected = pytest.approx(log(one, key), rel=1e-3, abs=1e-5)
            assert log(two, key) == expected, f"{stage}: different {key} on two processes"
        # Five of six steps in less than the whole time; one process alone knows half of the pairs.
        assert results["pairs_per_second"] > 0.75 * results["train_samples_per_second"], "not all pairs are counted"


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(recipes: Path):
    flags = ["--max_steps", "300", "--save_strategy", "steps", "--save_steps", "300", "--eval_strategy", "no"]
    launcher = subprocess.Popen(
        command("sft", *flags, "--output_dir", "run"), cwd=recipes, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    next(line for line in launcher.stdout if "  loss " in line)
    children = psutil.Process(launcher.pid).children(recursive=True)
    scripts = [child for child in children if str(ROOT / "scripts/sft.py") in child.cmdline()]
    scripts[-1].terminate()
    out, _ = launcher.communicate(timeout=120)
    assert launcher.returncode and out.count("stopped by SIGTERM") == 1, out
    (checkpoint,) = (recipes / "run").glob("checkpoint-*")
    saved = json.loads((checkpoint / "complete.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(saved), "one process's state is not in the checkpoint"
    assert not (recipes / "run/train_results.json").exists(), "a stopped run counts as finished"
    for folder in ("run", "whole"):
        launch("sft", recipes, *flags, "--output_dir", folder)
    weights = [(recipes / folder / "model.safetensors").read_bytes() for folder in ("run", "whole")]
    assert weights[0] == weights[1], "two processes that resumed end with different weights from two never interrupted"


@pytest.mark.slow
def test_a_mistake_is_one_sentence_through_make(tmp_path: Path):
    done = call("make", "dpo", "RECIPE=recipes/quickstart", "ACCELERATE=accelerate_configs/cpu.yaml",
                f"ARGS=--bta 0.3 --model_name_or_path x --output_dir {tmp_path}/run")  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and "'bta'" in lines[0] and "'beta'" in lines[0]
    assert not (tmp_path / "run").exists()


def test_make_lists_every_target():
    shown = call("make").stdout
    makefile = (ROOT / "Makefile").read_text().splitlines()
    phony = " ".join(line.removeprefix(".PHONY:") for line in makefile if line.startswith(".PHONY:"))
    missing = [target for target in phony.split() if f"\n{target} " not in f"\n{shown}"]
    assert not missing


def test_make_clean_keeps_runs():
    commands = call("make", "--dry-run", "clean").stdout.splitlines()
    (remove,) = [line for line in commands if line.startswith("rm ")]
    assert ".venv" in remove and "runs" not in remove
