"""Where a process is the point: several of them, accelerate's launcher, make."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from running import BIN, FLOAT32, ROOT, call, log
from safetensors.torch import load_file

TRAIN = ["--max_length", "128", "--pairs_per_step", "16", "--per_device_train_batch_size", "8", "--report_to", "none",
         "--activation_checkpointing", "false", "--logging_steps", "1", "--seed", "0", "--max_steps", "6",
         "--eval_strategy", "no", "--save_strategy", "no", *FLOAT32]  # fmt: skip


def launch(config: str, script: str, *flags: str | Path) -> subprocess.CompletedProcess:
    file = f"accelerate_configs/{config}.yaml"
    return call(BIN / "accelerate", "launch", "--quiet", "--config_file", file, f"scripts/{script}.py", *TRAIN,
                "--accelerate_config", file, *flags, OMP_NUM_THREADS="1")  # fmt: skip


def test_two_processes_give_the_losses_of_one(task, tiny_model, tmp_path):
    """Over 90 examples, of which the sixth step gets 10."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_bytes((task / "data/test.jsonl").read_bytes())
    rows = (task / "data/train.jsonl").read_bytes().splitlines(keepends=True)
    (data / "train.jsonl").write_bytes(b"".join(rows[:90]))
    for script, flags in {
        "sft": ["--learning_rate", "3e-3", "--model_name_or_path", tiny_model],
        "dpo": [
            "--learning_rate",
            "1e-3",
            "--model_name_or_path",
            tmp_path / "sft-cpu",
            "--precompute_ref_log_probs",
            "true",
        ],
    }.items():
        for config in ("cpu", "multi_cpu"):
            folder = tmp_path / f"{script}-{config}"
            done = launch(config, script, *flags, "--dataset_name", data, "--output_dir", folder)
            assert done.returncode == 0, f"{script} under {config}.yaml fails:\n{done.stdout}{done.stderr}"
            assert "FutureWarning" not in done.stderr, (
                f"a start prints what a user can do nothing about:\n{done.stderr}"
            )
        results = [
            json.loads((tmp_path / f"{script}-{c}/train_results.json").read_text()) for c in ("cpu", "multi_cpu")
        ]
        tokens = [result["tokens_per_second"] / result["pairs_per_second"] for result in results]
        # 5 of 6 steps in less than the whole time: at least 0.83; one process alone knows half of the pairs.
        share = results[1]["pairs_per_second"] / results[1]["train_samples_per_second"]
        assert share > 0.75, f"{script}: not both processes' pairs are counted: {results[1]}"
        assert tokens[0] == pytest.approx(tokens[1], rel=0.02), f"{script}: tokens a pair, 1 and 2 processes: {tokens}"
        one, two = log(tmp_path / f"{script}-cpu", "loss"), log(tmp_path / f"{script}-multi_cpu", "loss")
        assert len(two) == len(one) == 6 and two == pytest.approx(one, rel=1e-3), (
            f"{script}: a recipe trains differently on 2 processes: {one} {two}"
        )
    stock = [*flags, "--dataset_name", data, "--output_dir", tmp_path / "stock", "--shared_prefix", "false"]
    assert launch("multi_cpu", "dpo", *stock).returncode == 0, "--shared_prefix false fails on 2 processes"
    assert two == pytest.approx(log(tmp_path / "stock", "loss"), rel=1e-3), (
        "on 2 processes the engine changes the losses"
    )


@pytest.mark.slow
def test_two_processes_count_every_pair_of_short_steps_alike(task, tiny_model, tmp_path):
    """Over 26 pairs, 8 a step and 4 at a time: the last step of an epoch leaves the second process none, and so does
    the last round of 17 held-out pairs."""
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", 26), ("test", 17)):
        lines = (task / f"data/{split}.jsonl").read_bytes().splitlines(keepends=True)
        (data / f"{split}.jsonl").write_bytes(b"".join(lines[:rows]))
    short = ["--pairs_per_step", "8", "--per_device_train_batch_size", "4", "--max_steps", "8", "--eval_strategy",
             "steps", "--eval_steps", "4", "--per_device_eval_batch_size", "4", "--learning_rate", "1e-3",
             "--optim", "sgd", "--dataset_name", data, "--model_name_or_path", tiny_model]  # fmt: skip
    two_losses = ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"]
    for script, flags in {"sft": [], "dpo": two_losses, "reward": []}.items():
        for config in ("cpu", "multi_cpu"):
            done = launch(config, script, *short, *flags, "--output_dir", tmp_path / f"{script}-{config}")
            assert done.returncode == 0, f"{script} under {config}.yaml fails:\n{done.stdout}{done.stderr}"
        one, two = tmp_path / f"{script}-cpu", tmp_path / f"{script}-multi_cpu"
        entries = json.loads((one / "trainer_state.json").read_text())["log_history"]
        # Clocks; what counts padding, as transformers' FLOP do; and epochs, counted in batches.
        off = ("runtime", "per_second", "preparation_time", "padding", "total_flos", "epoch")
        for key in {key for entry in entries for key in entry if not key.endswith(off)}:
            assert log(two, key) == pytest.approx(log(one, key), rel=1e-4, abs=1e-5), (
                f"{script}: {key} is another on 2 processes"
            )
        weights = [load_file(folder / "model.safetensors") for folder in (one, two)]
        for name, weight in weights[0].items():
            assert torch.allclose(weights[1][name], weight, rtol=0, atol=1e-6), f"{script}: {name} is another"


def test_a_mistake_is_one_sentence_through_make(tmp_path):
    done = call("make", "dpo", "RECIPE=recipes/quickstart", "ACCELERATE=accelerate_configs/cpu.yaml",
                f"ARGS=--bta 0.3 --model_name_or_path x --output_dir {tmp_path}/run")  # fmt: skip
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode and told == ["error: command line: 'bta' is not a known key; did you mean 'beta'?"]
    assert "Traceback" not in done.stdout + done.stderr and not (tmp_path / "run").exists()


def test_dpo_runs_its_sft_only_when_that_is_missing(tmp_path):
    recipe, runs = tmp_path / "recipes/mine", ROOT / "runs/test-of-make"
    recipe.mkdir(parents=True)
    (recipe / "dpo-x.yaml").write_text(f"model_name_or_path: {runs.relative_to(ROOT)}/sft-x # policy and reference\n")
    command = ["make", "--dry-run", "dpo", f"RECIPE={recipe}", "STAGE=dpo-x", "ARGS=--beta 0.3"]
    missing = call(*command).stdout
    assert f"scripts/sft.py --config {recipe}/sft-x.yaml" in missing, "a missing SFT checkpoint is not made first"
    assert "sft-x.yaml --accelerate_config" in missing and missing.count("--beta 0.3") == 1, "DPO's flags reach SFT"
    named = call(*command[:-1], "ARGS=--model_name_or_path other").stdout
    assert "scripts/sft.py" not in named, "SFT runs although another model is named"
    (runs / "sft-x").mkdir(parents=True)
    try:
        (runs / "sft-x/model.safetensors").touch()
        there = call(*command).stdout
        (runs / "sft-x/run_config.yaml").touch()
        cut_short = call(*command).stdout
        (runs / "sft-x/train_results.json").touch()
        finished = call(*command).stdout
    finally:
        shutil.rmtree(runs)
    assert "scripts/sft.py" in cut_short, "DPO starts from an SFT that was killed before its end"
    assert "scripts/sft.py" not in finished, "a finished SFT runs again"
    assert "scripts/sft.py" not in there and "scripts/dpo.py" in there, (
        "SFT runs again although its checkpoint is there"
    )


def test_help_lists_every_target():
    shown = call("make").stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.split(".PHONY:")[1].splitlines()[0].split()
    assert all(f"{target} " in shown for target in targets), f"make does not tell of {targets}:\n{shown}"


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(task, tiny_model, tmp_path):
    """Through accelerate's launcher; the other process did not get the signal and must not wait for ever."""
    import psutil

    flags = ["--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--learning_rate", "1e-3",
             "--max_steps", "300", "--save_strategy", "steps", "--save_steps", "300"]  # fmt: skip
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = [BIN / "accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/multi_cpu.yaml"]
    command = [str(part) for part in (*command, "scripts/sft.py", *TRAIN, *flags, "--output_dir", run)]
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    next(line for line in launcher.stdout if "'loss'" in line)
    children = psutil.Process(launcher.pid).children(recursive=True)
    [child for child in children if "scripts/sft.py" in child.cmdline()][-1].terminate()
    told, _ = launcher.communicate(timeout=120)
    assert launcher.returncode, "the launcher calls a stopped run a finished one"
    assert told.count("stopped by SIGTERM") == 1, f"the user is not told once:\n{told}"
    (checkpoint,) = run.glob("checkpoint-*")
    saved = json.loads((checkpoint / "complete.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(saved), "one process's state is not in the checkpoint"
    assert not (run / "train_results.json").exists(), "a stopped run counts as finished"
    for folder in (run, whole):
        done = launch("multi_cpu", "sft", *flags, "--output_dir", folder)
        assert done.returncode == 0, f"the same command does not go on:\n{done.stdout}{done.stderr}"
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1], "two processes that went on end with other weights than two never interrupted"
