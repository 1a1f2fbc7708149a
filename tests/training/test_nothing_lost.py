"""Runs that are killed, told to stop, starved or damaged: the same command goes on and ends with the same weights."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from crashes import KILLED, run, start

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def command(task: Path, tiny_model: Path) -> list[Any]:
    """Twelve DPO steps with a checkpoint every fourth, of which the last two stay."""
    return [
        *("--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--max_length", "128"),
        *("--pairs_per_step", "16", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3", "--seed", "0"),
        *("--max_steps", "12", "--save_steps", "4", "--save_total_limit", "2", "--eval_strategy", "no"),
        *("--logging_steps", "1", "--report_to", "none", "--precompute_ref_log_probs", "true"),
        *("--precompute_ref_batch_size", "16", "--activation_checkpointing", "false"),
    ]


@pytest.fixture(scope="module")
def whole(command: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code = run("dpo", [*command, "--output_dir", folder / "run"], folder / "log")
    assert code == 0, (folder / "log").read_text()
    return folder / "run"


def again(command: list[Any], folder: Path) -> str:
    """The same command once more; what it printed."""
    log = folder / "log.again"
    code = run("dpo", [*command, "--output_dir", folder / "run"], log)
    assert code == 0, f"the same command does not go on:\n{log.read_text()}"
    return log.read_text()


def assert_same(folder: Path, whole: Path) -> None:
    assert (folder / "run" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), (
        "the run that went on ends with other weights than one that was never interrupted"
    )
    assert (folder / "run/train_results.json").is_file(), "the run is not marked as finished"


@pytest.mark.parametrize("place", KILLED)
def test_killed_anywhere_it_goes_on(place: str, command: list[Any], whole: Path, tmp_path: Path):
    code = run("dpo", [*command, "--output_dir", tmp_path / "run"], tmp_path / "log", KILLED[place])
    assert code == -signal.SIGKILL, f"it was not killed {place}:\n{(tmp_path / 'log').read_text()}"
    assert not (tmp_path / "run/train_results.json").exists(), "a killed run counts as finished"
    told = again(command, tmp_path)
    assert_same(tmp_path, whole)
    if "reference" not in place and "cached" not in place:
        assert "Going on from" in told, "a killed run starts again from nothing"


@pytest.fixture(scope="module")
def cut_short(command: list[Any], whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two whole checkpoints, 8 and 12, that did not come to its end."""
    folder = tmp_path_factory.mktemp("cut-short")
    shutil.copytree(whole, folder / "run")
    shutil.copytree(whole.parent / "cache", folder / "cache")
    for name in (WEIGHTS, "train_results.json"):
        (folder / "run" / name).unlink()
    return folder


FILES = [WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "complete.json"]


@pytest.mark.parametrize("damage", ["missing", pytest.param("truncated", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_set_aside(
    name: str, damage: str, command: list[Any], whole: Path, cut_short: Path, tmp_path: Path
):
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "run/checkpoint-12" / name
    content = file.read_bytes()
    file.unlink() if damage == "missing" else file.write_bytes(content[: len(content) // 2])
    told = again(command, tmp_path)
    assert "warning: " in told and "checkpoint-12 cannot be resumed from" in told, "nothing tells of the damage"
    assert name == "complete.json" or name in told, "the damaged file is not named"
    assert f"Going on from {tmp_path}/run/checkpoint-8" in told, "the checkpoint before it is not used"
    assert_same(tmp_path, whole)
    assert (tmp_path / "run/_broken-checkpoint-12").is_dir(), "what may be worth a look was deleted"
    left = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-12", "checkpoint-8"], "the damaged checkpoint counts among those that are kept"


def test_without_a_whole_checkpoint_it_starts_again(command: list[Any], whole: Path, cut_short: Path, tmp_path: Path):
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    for step in (8, 12):
        (tmp_path / f"run/checkpoint-{step}/optimizer.pt").unlink()
    assert "Going on" not in again(command, tmp_path)
    assert_same(tmp_path, whole)


def refused(command: list[Any], folder: Path, *flags: Any, **options: Any) -> str:
    """The one sentence that a run ends with."""
    log = folder / "log.refused"
    log.unlink(missing_ok=True)
    assert run("dpo", [*command, "--output_dir", folder / "run", *flags], log, **options) == 1, log.read_text()
    told = log.read_text()
    assert "Traceback" not in told, f"a user's mistake is a traceback:\n{told}"
    errors = [line.strip() for line in told.splitlines() if line.strip().startswith("error: ")]
    assert len(errors) == 1, f"not one sentence:\n{told}"
    return errors[0]


def test_a_checkpoint_that_was_asked_for_must_be_whole(command: list[Any], cut_short: Path, tmp_path: Path):
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run/checkpoint-12/optimizer.pt").unlink()
    told = refused(command, tmp_path, "--resume_from_checkpoint", tmp_path / "run/checkpoint-12")
    assert "optimizer.pt is missing" in told
    told = refused(command, tmp_path, "--resume_from_checkpoint", tmp_path / "run/checkpoint-9")
    assert "no such folder" in told


def wait_for(log: Path, text: str, child: Any) -> None:
    until = time.monotonic() + 60
    while text not in (log.read_text() if log.exists() else ""):
        assert child.is_alive() and time.monotonic() < until, f"{text!r} does not come:\n{log.read_text()}"
        time.sleep(0.02)


def slowly() -> None:
    """Half a second a step, so that a signal comes in the middle."""
    from transformers import Trainer

    step = Trainer.training_step
    Trainer.training_step = lambda *args, **kwargs: time.sleep(0.25) or step(*args, **kwargs)


def test_sigterm_saves_and_exits_with_143(command: list[Any], whole: Path, tmp_path: Path):
    log = tmp_path / "log"
    child = start("dpo", [*command, "--output_dir", tmp_path / "run"], log, slowly)
    wait_for(log, "'loss'", child)
    child.terminate()
    child.join(30)
    told = log.read_text()
    assert child.exitcode == 143, f"a preempted run exits with {child.exitcode}:\n{told}"
    assert "stopped by SIGTERM after step" in told and "Traceback" not in told
    assert "the same command goes on" in told, "nothing tells how to go on"
    for name in (WEIGHTS, "train_results.json", "README.md"):
        assert not (tmp_path / "run" / name).exists(), f"a stopped run leaves {name} as if it had finished"
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"Going on from {checkpoint}" in again(command, tmp_path), "what was trained before SIGTERM is lost"
    assert_same(tmp_path, whole)


WORKERS = ("--dataloader_num_workers", "2")


@pytest.mark.parametrize("flags", [WORKERS, ("--save_strategy", "epoch")], ids=" ".join)
def test_sigterm_to_the_whole_group_saves_once(flags: tuple, command: list[Any], whole: Path, tmp_path: Path):
    """As Slurm and the launcher send it: to the data loader's workers too, which must not take their process along."""
    import os

    log, command = tmp_path / "log", [*command, *flags, "--output_dir", tmp_path / "run"]
    child = start("dpo", command, log, slowly_in_a_group)
    wait_for(log, "'loss'", child)
    os.killpg(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 143, f"it exits with {child.exitcode}:\n{log.read_text()}"
    assert log.read_text().count("saving now") == 1, "a stop at an epoch's end unseals its checkpoint to save it again"
    assert run("dpo", command, tmp_path / "log.again") == 0, (tmp_path / "log.again").read_text()
    assert_same(tmp_path, whole)


def slowly_in_a_group() -> None:
    import os

    from tinydpo.training.checkpoints import SealedCheckpointsMixin

    os.setpgrp()
    slowly()
    save = SealedCheckpointsMixin._save_checkpoint
    SealedCheckpointsMixin._save_checkpoint = lambda *args: print("saving now", flush=True) or save(*args)


def test_sigterm_before_training_ends_it_at_once(command: list[Any], tmp_path: Path):
    log = tmp_path / "log"
    child = start("dpo", [*command, "--output_dir", tmp_path / "run"], log, slow_reference)
    wait_for(log, "Computing reference log probs", child)
    child.terminate()
    child.join(10)
    assert child.exitcode == -signal.SIGTERM, "it does not end while the reference log-probs are computed"
    assert not list((tmp_path / "run").glob("*")), "a run that never began left something behind"


def slow_reference() -> None:
    from tinydpo.training.trainers import SharedPrefixDPOTrainer as trainer

    compute = trainer.compute_ref_log_probs
    trainer.compute_ref_log_probs = lambda *args: time.sleep(1) or compute(*args)


def test_a_second_run_into_the_same_folder_is_refused(command: list[Any], whole: Path, tmp_path: Path):
    log = tmp_path / "log"
    child = start("dpo", [*command, "--output_dir", tmp_path / "run"], log, slowly)
    wait_for(log, "'loss'", child)
    told = refused(command, tmp_path)
    assert "another run is training into" in told and str(tmp_path / "run") in told
    child.kill()
    child.join()
    again(command, tmp_path)  # a killed run holds nothing
    assert_same(tmp_path, whole)


def stops_without(launcher: Any, log: Path, told: str, within: float) -> None:
    launcher.kill()
    launcher.join()
    until = time.monotonic() + within
    while told not in log.read_text():
        assert time.monotonic() < until, f"the script trains on without its launcher:\n{log.read_text()}"
        time.sleep(0.05)


def test_a_script_whose_launcher_died_saves_and_stops(command: list[Any], whole: Path, tmp_path: Path):
    """The launcher is a process between, as under `accelerate launch`, which leaves its script running on SIGTERM."""
    log = tmp_path / "log"
    launcher = start("dpo", [*command, "--output_dir", tmp_path / "run"], log, launched)
    wait_for(log, "'loss'", launcher)
    stops_without(launcher, log, "stopped by", within=30)
    assert "stopped by the launcher's end" in log.read_text()
    again(command, tmp_path)
    assert_same(tmp_path, whole)


def test_a_launcher_that_dies_before_the_first_step_is_noticed_too(command: list[Any], tmp_path: Path):
    log = tmp_path / "log"
    launcher = start("dpo", [*command, "--output_dir", tmp_path / "run"], log, launched_and_slow_reference)
    wait_for(log, "Computing reference log probs", launcher)
    stops_without(launcher, log, "stopped by the launcher's end after step 1;", within=60)


def launched_and_slow_reference() -> None:
    launched()
    slow_reference()


def launched() -> None:
    import os

    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if script := os.fork():
        os.waitpid(script, 0)
        os._exit(0)
    slowly()


@pytest.mark.parametrize("rate", ["1e30", "1e4"])
def test_divergence_ends_the_run_early(rate: str, command: list[Any], tmp_path: Path):
    flags = ["--learning_rate", rate, "--save_steps", "1", "--max_grad_norm", "0"]
    told = refused(command, tmp_path, *flags)
    assert "diverged" in told or "not saved" in told, told
    assert "--learning_rate" in told, "nothing tells what to change"
    import torch
    from safetensors.torch import load_file

    for weights in (tmp_path / "run").glob("checkpoint-*/model.safetensors"):
        assert all(torch.isfinite(w).all() for w in load_file(weights).values()), (
            "NaN weights took a checkpoint's place"
        )


def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(command: list[Any], whole: Path, tmp_path: Path):
    import subprocess

    size = sum(file.stat().st_size for file in (whole / "checkpoint-8").rglob("*"))
    (tmp_path / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "none", str(tmp_path / "run")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        told = refused(command, tmp_path)
        assert "the disk is full" in told and "run the same command again" in told
        subprocess.run(["mount", "-o", "remount,size=100m", str(tmp_path / "run")], check=True)
        assert "Going on from" in again(command, tmp_path), "the last good checkpoint was lost"
        assert_same(tmp_path, whole)
    finally:
        subprocess.run(["umount", str(tmp_path / "run")], check=True)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(command: list[Any], tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    told = refused(command, tmp_path, "--model_name_or_path", "no/such/model")
    assert f"output_dir {tmp_path}/run" in told and "choose another" in told


def test_a_run_is_not_continued_on_other_data(command: list[Any], cut_short: Path, task: Path, tmp_path: Path):
    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    data = tmp_path / "data"
    shutil.copytree(task / "data", data)
    at = command.index("--dataset_name") + 1
    config = tmp_path / "run/run_config.yaml"
    config.write_text(config.read_text().replace(str(task / "data"), str(data)))
    text = (data / "train.jsonl").read_text()
    swapped = text.replace('"chosen"', '"-"').replace('"rejected"', '"chosen"').replace('"-"', '"rejected"')
    for changed in ("".join(text.splitlines(keepends=True)[:-1]), swapped):
        (data / "train.jsonl").write_text(changed)
        told = refused([*command[:at], data, *command[at + 1 :]], tmp_path)
        assert f"{data} has changed since the run" in told


def test_a_run_is_not_continued_from_other_weights(command: list[Any], cut_short: Path, tmp_path: Path):
    """The SFT it starts from was trained again: policy and reference would no longer be of one model."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(cut_short, tmp_path, dirs_exist_ok=True)
    at = command.index("--model_name_or_path") + 1
    model = tmp_path / "model"
    shutil.copytree(command[at], model)
    config = tmp_path / "run/run_config.yaml"
    config.write_text(config.read_text().replace(str(command[at]), str(model)))
    command = [*command[:at], model, *command[at + 1 :]]
    weights = load_file(model / WEIGHTS)
    weights["transformer.ln_f.bias"] += torch.ones(())
    save_file(weights, model / WEIGHTS, {"format": "pt"})
    assert f"{model} has changed since the run" in refused(command, tmp_path)


def test_dpo_does_not_start_from_a_run_that_has_not_finished(command: list[Any], cut_short: Path, tmp_path: Path):
    shutil.copytree(cut_short / "run", tmp_path / "sft")
    told = refused(command, tmp_path, "--model_name_or_path", tmp_path / "sft")
    assert f"{tmp_path}/sft holds a run that has not finished" in told


def test_a_checkpoint_cannot_run_code(command: list[Any], cut_short: Path, tmp_path: Path):
    import json
    import pickle

    class Malice:
        def __reduce__(self) -> tuple:
            return exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = tmp_path / name
        shutil.copytree(cut_short, folder, ignore=shutil.ignore_patterns("checkpoint-12"))
        file = folder / "run/checkpoint-8" / name
        file.write_bytes(pickle.dumps(Malice()))
        seal = file.with_name("complete.json")
        seal.write_text(json.dumps(json.loads(seal.read_text()) | {name: file.stat().st_size}))
        told = refused(command, folder)
        assert not (tmp_path / "owned").exists(), f"{name} of a checkpoint runs code"
        assert "checkpoint-8" in told, "the sentence does not name the checkpoint"


def test_a_models_own_code_runs_on_request_alone(command: list[Any], tmp_path: Path):
    import json

    at = command.index("--model_name_or_path") + 1
    model, owned = tmp_path / "model", tmp_path / "owned"
    shutil.copytree(command[at], model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Strange", "AutoModelForCausalLM": "code.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(
        f"""open({str(owned)!r}, "w").close()
from transformers import GPT2Config, GPT2LMHeadModel
class Strange(GPT2Config):
    model_type = "strange"
class Model(GPT2LMHeadModel):
    config_class = Strange
"""
    )
    command = [*command[:at], model, *command[at + 1 :], "--max_steps", "1"]
    told = refused(command, tmp_path)
    assert "--trust_remote_code true" in told and not owned.exists(), "code of a stranger's model was run"
    again([*command, "--trust_remote_code", "true"], tmp_path)
    assert owned.exists(), "--trust_remote_code has no effect"


def test_a_damaged_reference_cache_is_made_again(command: list[Any], whole: Path, tmp_path: Path):
    shutil.copytree(whole.parent / "cache", tmp_path / "cache")
    import pyarrow as pa

    damaged = 0
    for file in (tmp_path / "cache").rglob("*.arrow"):
        with pa.memory_map(str(file)) as source:
            names = pa.ipc.open_stream(source).schema.names
        if names == ["ref_chosen_logps", "ref_rejected_logps"]:
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
            damaged += 1
    assert damaged, "the reference log-probs were not cached"
    told = again(command, tmp_path)
    assert "in the cache is cut or damaged" in told, "nothing tells of the damage"
    assert_same(tmp_path, whole)


def test_the_same_recipe_gives_the_same_weights(command: list[Any], whole: Path, tmp_path: Path):
    again(command, tmp_path)
    assert_same(tmp_path, whole)
    log = tmp_path / "log.config"
    argv = ["--config", whole / "run_config.yaml", "--output_dir", tmp_path / "third"]
    assert run("dpo", argv, log) == 0, log.read_text()
    assert (tmp_path / "third" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes(), (
        "a run's folder does not make the run again"
    )
