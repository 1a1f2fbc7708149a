"""How tests run the scripts: in this process, or as commands."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
FAST_BF16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # functions of torch.cpu
FLOAT32 = ["--bf16", "false"]  # for commands, which `float32_by_default` does not reach
SMALL = ["--max_length", "128", "--pairs_per_step", "16", "--per_device_train_batch_size", "8", "--report_to", "none",
         "--activation_checkpointing", "false", "--logging_steps", "1", "--seed", "0", "--save_steps", "4",
         "--save_total_limit", "2", "--eval_strategy", "steps", "--eval_steps", "6", "--eval_pairs", "16"]  # fmt: skip


def run(script: str, *argv: str | Path) -> None:
    """Run a training script in this process, small unless `argv` says otherwise."""
    importlib.import_module(script).main([*SMALL, *map(str, argv)])


def log(folder: Path, key: str) -> list[float]:
    """Every value of `key` that a run logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def call(*command: str | Path, **env: str) -> subprocess.CompletedProcess:
    """Run a command in the repository, without the variables of the `make` that runs the tests."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=400, check=False)
