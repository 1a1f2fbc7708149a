"""From one process to many machines: the same recipe gives the same losses and a plain model.

ZeRO runs on CPUs as it does on GPUs, with gloo for NCCL; two hosts are two network namespaces of this machine.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from running import FLOAT32, ROOT, call, log
from safetensors.torch import load_file

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
TRAIN = ["--max_length", "128", "--pairs_per_step", "16", "--per_device_train_batch_size", "4", "--report_to", "none",
         "--activation_checkpointing", "false", "--logging_steps", "1", "--seed", "0", "--eval_strategy", "no",
         "--optim", "adamw_torch_fused", "--learning_rate", "1e-3", *FLOAT32]  # fmt: skip
SIX = ["--max_steps", "6", "--save_strategy", "no"]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install '.[deepspeed]' (make test-all)"
)


def on_cpus(config: str, folder: Path) -> Path:
    """The accelerate file as it is shipped, on CPUs."""
    file = folder / f"{config}.yaml"
    shipped = (ROOT / f"accelerate_configs/{config}.yaml").read_text()
    file.write_text(shipped.replace("use_cpu: false", "use_cpu: true"))
    return file


def train(config: Path, script: str, *flags: str | Path, by: tuple = ()) -> subprocess.CompletedProcess:
    where = ["--use_cpu", "true"] if by else ["--accelerate_config", config]
    command = [*LAUNCH, "--config_file", config, *by, f"scripts/{script}.py", *TRAIN, *where, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{script} fails under {config.name}:\n{done.stdout}{done.stderr}"
    assert "FutureWarning" not in done.stderr, f"{config.name} prints what a user can do nothing about:\n{done.stderr}"
    return done


def same_run(one: Path, other: Path, what: str) -> None:
    assert log(other, "loss") == pytest.approx(log(one, "loss"), rel=1e-3), f"{what}: the recipe trains differently"
    expected, saved = (load_file(run / "model.safetensors") for run in (one, other))
    saved = {name: saved[name] for name in expected}  # FSDP saves a tied head, too
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def cpu_runs(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft` and `dpo` as one process trains them, to hold the others against."""
    folder = tmp_path_factory.mktemp("one-process")
    for script, start in (("sft", tiny_model), ("dpo", folder / "sft")):
        train(ROOT / "accelerate_configs/cpu.yaml", script, *SIX, "--dataset_name", task / "data",
              "--model_name_or_path", start, "--output_dir", folder / script)  # fmt: skip
    return folder


def all_stages(
    config: Path, cpu_runs: Path, task: Path, tiny_model: Path, folder: Path, by: tuple = ()
) -> subprocess.CompletedProcess:
    for script, start in (("sft", tiny_model), ("dpo", cpu_runs / "sft")):
        done = train(config, script, *SIX, "--dataset_name", task / "data", "--model_name_or_path", start,
                     "--output_dir", folder / script, by=by)  # fmt: skip
        same_run(cpu_runs / script, folder / script, f"{script} under {config.name}")
    return done


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_zero_trains_like_one_process_and_saves_a_plain_model(config, cpu_runs, task, tiny_model, tmp_path):
    all_stages(on_cpus(config, tmp_path), cpu_runs, task, tiny_model, tmp_path)


@pytest.mark.slow
@needs_deepspeed
def test_zero_in_bf16_does_not_round_the_cached_reference(cpu_runs, task, tmp_path):
    train(on_cpus("zero2", tmp_path), "dpo", "--max_steps", "1", "--save_strategy", "no", "--bf16", "true",
          "--precompute_ref_log_probs", "true", "--dataset_name", task / "data",
          "--model_name_or_path", cpu_runs / "sft", "--output_dir", tmp_path / "dpo")  # fmt: skip
    for answer in ("chosen", "rejected"):
        rewards = log(tmp_path / "dpo", f"rewards/{answer}")
        assert rewards == pytest.approx([0], abs=1e-4), (
            f"the untrained policy differs from its own log-probs: {rewards}"
        )


@pytest.mark.slow
@needs_deepspeed
def test_a_zero3_run_goes_on_from_its_checkpoint(cpu_runs, task, tiny_model, tmp_path):
    config, flags = on_cpus("zero3", tmp_path), ["--dataset_name", task / "data", "--model_name_or_path", tiny_model]
    train(config, "sft", "--max_steps", "6", "--save_steps", "3", *flags, "--output_dir", tmp_path / "sft")
    (tmp_path / "sft/train_results.json").unlink()  # as if it had been killed before its end
    shutil.rmtree(tmp_path / "sft/checkpoint-6")
    done = train(config, "sft", "--max_steps", "6", "--save_steps", "3", *flags, "--output_dir", tmp_path / "sft")
    assert "Resuming from" in done.stdout and "checkpoint-3" in done.stdout, f"it starts anew:\n{done.stdout}"
    same_run(cpu_runs / "sft", tmp_path / "sft", "sft under ZeRO-3, resumed")


@pytest.mark.slow
def test_fsdp2_trains_like_one_process(cpu_runs, task, tiny_model, tmp_path):
    """The shipped file through accelerate's launcher; tests/training/fsdp_on_cpus.py says what is in the way."""
    by = ("tests/training/fsdp_on_cpus.py",)
    done = all_stages(on_cpus("fsdp", tmp_path), cpu_runs, task, tiny_model, tmp_path, by=by)
    assert "2 processes (FSDP2)" in done.stdout


@pytest.mark.slow
def test_fsdp2_in_bf16_does_not_round_log_probs(cpu_runs, task, tmp_path):
    train(on_cpus("fsdp", tmp_path), "dpo", "--max_steps", "1", "--save_strategy", "no", "--bf16", "true",
          "--dataset_name", task / "data", "--model_name_or_path", cpu_runs / "sft", "--output_dir", tmp_path / "dpo",
          by=("tests/training/fsdp_on_cpus.py",))  # fmt: skip
    (mean,) = log(tmp_path / "dpo", "logps/chosen")
    # bf16 has steps of a half or more here, so the mean of 16 rounded sums would be a multiple of 1/32.
    assert abs(mean * 32 - round(mean * 32)) > 1e-3, f"the answers' log-probs are rounded: their mean is {mean}"


@pytest.mark.parametrize("file", sorted(ROOT.glob("accelerate_configs/*.yaml")), ids=lambda path: path.stem)
def test_each_accelerate_file_gives_its_command_and_starts_through_make(file):
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"make dpo ACCELERATE=accelerate_configs/{file.name}" in header and "costs" in header.lower()
    done = call("make", "--dry-run", "dpo", f"ACCELERATE={file.relative_to(ROOT)}")
    threads = done.stdout.split("--num_cpu_threads_per_process ")[1].split()[0]
    assert int(threads) >= 1 and not done.stderr, done.stderr
    config = yaml.safe_load(file.read_text())
    assert config["num_processes"] % config["num_machines"] == 0, "the machines cannot share the processes evenly"


SLURM = {
    "srun": """echo "srun $*" >>calls; for last; do :; done
while case $1 in --*) ;; *) false;; esac; do shift; done; exec "$@" """,
    "scontrol": """echo "scontrol $*" >>calls; [ "$1" = requeue ] || printf 'first\\nsecond\\n' """,
    "scancel": """echo "scancel $*" >>calls; touch stopped; sleep 0.5""",  # the launcher ends first
    "accelerate": """echo "accelerate $*" >>calls; until [ -e stopped ]; do sleep 0.05; done; exit $CODE""",
}


@pytest.mark.parametrize(("code", "requeued"), [(1, True), (0, False)])
def test_slurm_hands_the_signal_on_and_requeues_what_is_not_finished(code, requeued, tmp_path):
    """Slurm's commands, and the launcher, are stand-ins that note how they were called."""
    for name, script in SLURM.items():
        file = tmp_path / (".venv/bin" if name == "accelerate" else "bin") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)
    shutil.copytree(ROOT / "accelerate_configs", tmp_path / "accelerate_configs")
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CODE": str(code),
                        "SLURM_JOB_NODELIST": "first,second", "SLURM_NODEID": "0", "SLURM_NNODES": "2"}  # fmt: skip
    command = ["bash", str(ROOT / "accelerate_configs/slurm.sbatch"), "scripts/dpo.py", "--beta", "0.3"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    calls, deadline = tmp_path / "calls", time.monotonic() + 30
    while not (calls.exists() and "accelerate" in calls.read_text()):
        assert time.monotonic() < deadline and job.poll() is None, f"nothing is launched: {job.communicate()[1]}"
        time.sleep(0.05)
    job.terminate()
    assert job.wait(timeout=30) == code, "the job's exit code is not the run's"
    called = calls.read_text()
    launched = next(line for line in called.splitlines() if line.startswith("accelerate"))
    assert "--machine_rank 0 --main_process_ip first --main_process_port 20007" in launched, "machines cannot meet"
    assert "scripts/dpo.py --beta 0.3 --accelerate_config accelerate_configs/multi_node.yaml" in launched
    assert "scancel --signal=TERM 7.0" in called, "the scripts on the machines do not get the signal"
    assert ("scontrol requeue 7" in called) == requeued


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two network namespaces, 10.77.0.1 and 10.77.0.2, that share a file system."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("two hosts are two network namespaces: needs root and the command `ip` (Debian: iproute2)")
    names = [f"tinydpo-{os.getpid()}-{rank}" for rank in (0, 1)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"]
    for number, name in enumerate(names, start=1):
        commands += [f"-n {name} address add 10.77.0.{number}/24 dev eth0"]
        commands += [f"-n {name} link set {device} up" for device in ("eth0", "lo")]
    try:
        for command in commands:
            if subprocess.run(["ip", *command.split()], check=False).returncode:
                pytest.skip("this machine does not allow network namespaces")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def run_on_hosts(hosts: list[str], folder: Path, script: str, *flags: str | Path) -> None:
    """Each machine's command, as docs/scaling.md gives it; relative paths and caches are the machine's own."""
    config = ROOT / "accelerate_configs/multi_cpu.yaml"
    env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []
    for rank, host in enumerate(hosts):
        home = folder / f"host{rank}"
        home.mkdir(exist_ok=True)
        command = [*LAUNCH, "--config_file", config, "--num_machines", "2", "--machine_rank", rank,
                   "--main_process_ip", "10.77.0.1", "--main_process_port", "29500",
                   ROOT / f"scripts/{script}.py", *TRAIN, "--accelerate_config", config, *flags]  # fmt: skip
        own = {"HF_HOME": str(home / "hf"), "HF_DATASETS_CACHE": str(home / "datasets")}
        with open(folder / f"host{rank}.log", "w") as file:
            command = ["ip", "netns", "exec", host, *map(str, command)]
            started.append(subprocess.Popen(command, cwd=home, env=env | own, stdout=file, stderr=file))
    codes = [process.wait(timeout=900) for process in started]
    assert codes == [0, 0], "\n".join((folder / f"host{rank}.log").read_text() for rank in (0, 1))


@pytest.mark.slow
def test_two_hosts_with_nothing_shared_train_like_one_process(hosts, cpu_runs, task, tiny_model, tmp_path):
    """Each has its own cache and run folder; the model is in the first one's."""
    for script, start in (("sft", tiny_model), ("dpo", cpu_runs / "sft")):
        run_on_hosts(hosts, tmp_path, script, *SIX, "--dataset_name", task / "data", "--model_name_or_path", start,
                     "--output_dir", f"runs/{script}")  # fmt: skip
        same_run(cpu_runs / script, tmp_path / f"host0/runs/{script}", f"{script} on two hosts")
