"""Runs that are killed, stopped, starved or damaged: the same command resumes and ends with the same weights."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crashes
import datasets.config
import pytest
import torch
from running import FLOAT32, SMALL, log, run
from safetensors.torch import load_file, save_file

from tinydpo.errors import UserError, report_errors
from tinydpo.files import write_json
from tinydpo.run_folder import RunFolder
from tinydpo.training.callbacks import StopOnDivergence
from tinydpo.training.checkpoints import MANIFEST, find_last_complete, hash_files
from tinydpo.training.setup import lock_folder

WEIGHTS = "model.safetensors"
STAGES = ("sft", "dpo", "reward")


@pytest.fixture(scope="module")
def flags(task: Path, tiny_model: Path) -> list[Any]:
    """Twelve steps with a checkpoint every fourth, of which the last two stay; an epoch has six."""
    return ["--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--learning_rate", "3e-3",
            "--max_steps", "12", "--eval_strategy", "no", *FLOAT32]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft`, `dpo` and `reward`, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        # Reference log-probs that another test cached, in other batches, would differ in their last bits.
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        for stage in STAGES:
            run(stage, *flags, *flags_of(stage), "--output_dir", folder / stage)
    return folder


def flags_of(stage: str) -> list[str]:
    return ["--precompute_ref_log_probs", "true", "--precompute_ref_batch_size", "16"] if stage == "dpo" else []


@pytest.fixture
def resume(
    flags: list[Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable:
    """Run a stage once more into `tmp_path/run`, ask for the same end as the whole run's; what it printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def resume(stage: str, *more: Any) -> str:
        capfd.readouterr()
        run(stage, *flags, *flags_of(stage), "--output_dir", tmp_path / "run", *more)
        assert (tmp_path / "run" / WEIGHTS).read_bytes() == (whole / stage / WEIGHTS).read_bytes(), "different weights"
        assert log(tmp_path / "run", "num_tokens") == log(whole / stage, "num_tokens"), "tokens are counted anew"
        return "".join(capfd.readouterr())

    return resume


def start(stage: str, flags: list[Any], folder: Path, prepare: Callable, *more: Any) -> Any:
    argv = [*SMALL, *flags, *flags_of(stage), "--output_dir", folder / "run", *more]
    return crashes.start(stage, argv, folder / "log", prepare)


@pytest.mark.parametrize(
    ("stage", "place", "checkpoint"),
    [
        ("sft", crashes.die_in_sixth_step, "checkpoint-4"),
        ("dpo", crashes.die_in_second_checkpoint, "checkpoint-4"),
        ("dpo", crashes.die_in_reference_pass, None),
        ("reward", crashes.die_before_results, "checkpoint-12"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_resume_after_a_kill_gives_same_weights(
    stage: str, place: Callable, checkpoint: str | None, flags: list[Any], resume: Callable, tmp_path: Path
):
    child = start(stage, flags, tmp_path, place)
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "run/train_results.json").exists(), "a killed run counts as finished"
    out = resume(stage)
    if checkpoint:
        assert f"Resuming from {tmp_path}/run/{checkpoint}." in out, "it starts again from nothing"


def test_same_flags_give_same_weights(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run("dpo", "--config", whole / "dpo/run_config.yaml", "--output_dir", tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (whole / "dpo" / WEIGHTS).read_bytes()


@pytest.fixture
def cut_short(whole: Path, tmp_path: Path) -> Path:
    """A DPO run with two complete checkpoints, 8 and 12, that was killed before its end."""
    shutil.copytree(whole / "dpo", tmp_path / "run")
    cut(tmp_path / "run", 12)
    return tmp_path / "run"


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def cut(folder: Path, step: int) -> None:
    """Leave of a finished run what a kill soon after the checkpoint of `step` would have left."""
    for name in (WEIGHTS, "train_results.json"):
        (folder / name).unlink()
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def test_a_damaged_checkpoint_is_set_aside(cut_short: Path, resume: Callable):
    change_a_byte(cut_short / "checkpoint-12/optimizer.pt")
    out = resume("dpo")
    assert out.count("warning: ") == 1
    assert "checkpoint-12 cannot be resumed from (optimizer.pt is missing or damaged)" in out
    assert f"Resuming from {cut_short}/checkpoint-8." in out
    assert (cut_short / "_broken-checkpoint-12").is_dir(), "what may be worth a look was deleted"
    left = sorted(path.name for path in cut_short.glob("checkpoint-*"))
    assert left == ["checkpoint-12", "checkpoint-8"], "the damaged one counts among those that are kept"


@pytest.mark.parametrize("damage", [Path.unlink, change_a_byte], ids=["missing", "changed"])
@pytest.mark.parametrize("name", [WEIGHTS, "rng_state.pth", "complete.json"])
def test_a_checkpoint_with_a_damaged_file_is_not_resumed(name: str, damage: Callable, cut_short: Path):
    damage(cut_short / "checkpoint-12" / name)
    assert find_last_complete(cut_short) == str(cut_short / "checkpoint-8")


def test_the_newest_checkpoint_stays_when_the_clock_goes_back(cut_short: Path, resume: Callable):
    cut_short.joinpath("checkpoint-12").rename(cut_short / "_not-a-checkpoint")
    os.utime(cut_short / "checkpoint-8", (2**32, 2**32))
    resume("dpo", "--save_total_limit", "1")
    left = [path.name for path in cut_short.glob("checkpoint-*")]
    assert left == ["checkpoint-12"], "the older one is kept, the newest one deleted"


def test_a_checkpoint_at_the_last_step_is_not_trained_on(flags: list[Any], tmp_path: Path):
    """The weights were deleted, or never saved; the eighth step is in the middle of the second epoch."""
    argv = [*flags, "--max_steps", "8", "--output_dir", tmp_path]
    run("sft", *argv)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).unlink()
    run("sft", *argv)
    assert (tmp_path / WEIGHTS).exists(), "a run without weights counts as finished"
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 8, "it trains more than 8 steps"
    assert (tmp_path / WEIGHTS).read_bytes() == weights, "different weights"


def test_a_synced_reference_is_resumed(flags: list[Any], tmp_path: Path):
    argv = [*flags, "--sync_ref_model", "true", "--ref_model_sync_steps", "2", "--output_dir", tmp_path]
    run("dpo", *argv)
    weights = (tmp_path / WEIGHTS).read_bytes()
    cut(tmp_path, 8)
    run("dpo", *argv)
    assert (tmp_path / WEIGHTS).read_bytes() == weights, "the reference begins again at the start model"
    cut(tmp_path, 12)
    for checkpoint in tmp_path.glob("checkpoint-*"):  # as one of FSDP
        (checkpoint / "reference.safetensors").unlink()
        write_json(checkpoint / MANIFEST, hash_files(checkpoint))
    with pytest.raises(UserError, match=r"checkpoint-12 does not hold the reference .* pass another --output_dir"):
        run("dpo", *argv)


def refused(flags: list[Any], match: str, folder: Path, *more: Any) -> None:
    with pytest.raises(UserError, match=match):
        run("dpo", *flags, *flags_of("dpo"), "--output_dir", folder, *more)


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, f"{text!r} does not come:\n{log.read_text()}"
        time.sleep(0.02)


def slower_group() -> None:
    """A step that lasts until a test has had its say."""
    from transformers import Trainer

    Trainer.training_step = lambda *args, **kwargs: time.sleep(30)


def slow_group() -> None:
    """A process group of its own, a fifth of a second a step, and a word at each save."""
    from transformers import Trainer

    from tinydpo.training.checkpoints import SafeCheckpointsMixin

    os.setpgrp()
    step = Trainer.training_step
    save = SafeCheckpointsMixin._save_checkpoint

    def slow_step(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return step(*args, **kwargs)

    def save_aloud(*args: Any) -> None:
        print("saving now", flush=True)
        save(*args)

    Trainer.training_step = slow_step
    SafeCheckpointsMixin._save_checkpoint = save_aloud


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_saves_once_and_sets_the_exit_status(
    number: int, name: str, flags: list[Any], resume: Callable, tmp_path: Path
):
    """To the whole group, as Slurm or a terminal sends it: the data loader's workers must not take it down."""
    save = ["--save_strategy", "epoch"]
    child = start("dpo", flags, tmp_path, slow_group, *save, "--dataloader_num_workers", "1")
    wait_for(tmp_path / "log", "  loss ")
    os.killpg(child.pid, number)
    child.join(60)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == 128 + number, log
    assert f"stopped by {name} after step" in log and "the same command resumes from" in log
    assert "Traceback" not in log
    assert log.count("saving now") == 1, "its last checkpoint is saved a second time"
    for file in (WEIGHTS, "train_results.json", "README.md"):
        assert not (tmp_path / "run" / file).exists(), f"a stopped run leaves {file} as if it had finished"
    assert f"Resuming from {tmp_path}/run/checkpoint-" in resume("dpo", *save)


def test_a_second_ctrl_c_ends_at_once_and_says_that_nothing_was_saved(
    flags: list[Any], resume: Callable, tmp_path: Path
):
    child = start("dpo", flags, tmp_path, slower_group, "--save_strategy", "epoch")
    wait_for(tmp_path / "log", "/12 [")  # the progress bar
    os.kill(child.pid, signal.SIGINT)
    wait_for(tmp_path / "log", "Ctrl-C again ends the run at once")
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    log = (tmp_path / "log").read_text()
    assert child.exitcode == 130 and "Traceback" not in log, log
    assert "interrupted; the same command starts over, as no checkpoint is complete" in log
    assert "holds no checkpoint: starting over." in resume("dpo", "--save_strategy", "epoch")


def launched() -> None:
    """This process becomes a launcher that waits for its script, as `accelerate launch` does."""
    from tinydpo.training import callbacks

    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    script = os.fork()
    if script:
        os.waitpid(script, 0)
        os._exit(0)
    callbacks.LAUNCHER_PID = os.getppid()
    slow_group()


def test_a_script_without_its_launcher_saves_and_stops(flags: list[Any], resume: Callable, tmp_path: Path):
    """SIGTERM to `accelerate launch` with one process ends the launcher only."""
    launcher = start("dpo", flags, tmp_path, launched)
    wait_for(tmp_path / "log", "  loss ")
    assert "stopped" not in (tmp_path / "log").read_text()
    launcher.kill()
    wait_for(tmp_path / "log", "stopped by the launcher's end after step")
    assert "Resuming from" in resume("dpo")


@pytest.mark.parametrize(
    ("logging_steps", "save_strategy"),
    [("1", "steps"), ("100", "steps"), ("100", "no")],
    ids=["by its loss", "by its weights", "by its last weights"],
)
def test_a_diverged_run_ends_without_saving_its_weights(
    logging_steps: str, save_strategy: str, flags: list[Any], tmp_path: Path
):
    handler = signal.getsignal(signal.SIGTERM)
    refused(flags, "(diverged|are not saved); lower --learning_rate", tmp_path, "--learning_rate", "1e30",
            "--save_steps", "1", "--max_grad_norm", "0", "--logging_steps", logging_steps,
            "--save_strategy", save_strategy)  # fmt: skip
    for weights in tmp_path.rglob(WEIGHTS):
        assert all(torch.isfinite(weight).all() for weight in load_file(weights).values())
    assert signal.getsignal(signal.SIGTERM) == handler, "SIGTERM is swallowed after a failed run"


def test_divergence_is_measured_by_the_first_loss_of_the_whole_run():
    args = SimpleNamespace(learning_rate=1.0)
    state = SimpleNamespace(global_step=9, log_history=[{"loss": 2.0}, {"eval_loss": 1.0}, {"loss": 300.0}])
    with pytest.raises(UserError, match="diverged"):  # though it is the first one since a resume
        StopOnDivergence().on_log(args, state, None, {"loss": 300.0})


def test_a_full_disk_costs_no_checkpoint(
    flags: list[Any], whole: Path, resume: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
):
    size = sum(file.stat().st_size for file in (whole / "dpo/checkpoint-8").rglob("*"))
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(SystemExit), report_errors():
            run("dpo", *flags, *flags_of("dpo"), "--output_dir", disk)
        assert "the disk" in capfd.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert f"Resuming from {disk}/checkpoint-4." in resume("dpo")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_with_changed_inputs_is_neither_resumed_nor_called_finished(
    finished: bool, cut_short: Path, flags: list[Any], task: Path, tiny_model: Path
):
    """The SFT model was trained again, or the data set edited."""
    if finished:
        write_json(cut_short / "train_results.json", {})
        shutil.copy(cut_short / "checkpoint-12" / WEIGHTS, cut_short)
    data = shutil.copytree(task / "data", cut_short.parent / "data")
    model = shutil.copytree(tiny_model, cut_short.parent / "model")
    config = cut_short / "run_config.yaml"
    config.write_text(config.read_text().replace(str(task / "data"), str(data)).replace(str(tiny_model), str(model)))
    moved = [*flags, "--dataset_name", data, "--model_name_or_path", model]

    summary = json.loads((cut_short / "data_summary.json").read_text())
    summary["train"]["notes"] = {"worded otherwise by an older version": 1}
    (cut_short / "data_summary.json").write_text(json.dumps(summary))
    weights = load_file(model / WEIGHTS)
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, model / WEIGHTS, {"format": "pt"})
    refused(moved, f"{model} has changed since the run", cut_short)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[1:]))
    refused(moved, f"{data} has changed since the run in {cut_short}", cut_short)


def test_a_run_that_cannot_end_well_is_refused_first(cut_short: Path, flags: list[Any], tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused(flags, "file: .*choose another", tmp_path / "file")
    refused(flags, f"{cut_short} was stopped", tmp_path / "dpo", "--model_name_or_path", cut_short)
    with lock_folder(RunFolder(cut_short)):
        refused(flags, f"another run is training into {cut_short}", cut_short)


def test_a_mount_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(RunFolder(tmp_path)):
        pass
