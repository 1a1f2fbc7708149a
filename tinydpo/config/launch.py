"""Device, precision and batch: the accelerate file says where a run goes, the recipe what it trains.

TRL turns bf16 on by default, over the accelerate file and on machines without a GPU too, and accelerate silently
starts fewer processes than asked, or independent ones. So what the user left unset is filled in here before TRL sees
it, and what runs is compared with what the accelerate file asks for.
"""

import logging
import math
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.files import read_yaml
from tinydpo.models.precision import has_fast_bf16
from tinydpo.run_folder import RunFolder

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, per how many
PRECISION_FLAGS = {"no": "--bf16 false --fp16 false", "bf16": "--bf16 true", "fp16": "--fp16 true"}
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by accelerate's names
# What the launcher must have set for sharded runs; some of accelerate's defaults differ.
FSDP_NEEDS = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",  # or no final model is saved
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",  # or most ranks hold an empty reference model
}
ZERO3_NEEDS = {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}  # or no final model is saved


def fill_defaults(settings: dict[str, Any]) -> None:
    """Fill in `use_cpu`, `bf16`, the batch per device and the accumulation where the user left them unset."""
    import torch
    from accelerate.utils import parse_flag_from_env

    asked = read_yaml(settings["accelerate_config"]) if settings["accelerate_config"] else {}
    on_cpu = settings["use_cpu"] or parse_flag_from_env("ACCELERATE_USE_CPU") or asked.get("use_cpu") is True
    settings["use_cpu"] = on_cpu or not torch.accelerator.is_available()
    if settings["bf16"] is None:
        _fill_precision(settings, asked)
    if settings["pairs_per_step"] is not None:
        _split_batch(settings, int(os.environ.get("WORLD_SIZE", 1)))


def _fill_precision(settings: dict[str, Any], asked: dict[str, Any]) -> None:
    """By precedence: `--fp16`, the accelerate file (on CPUs only its `no`), the resumed run, bf16 where it is fast."""
    precision = _get_mixed_precision(asked)
    before = RunFolder(settings["output_dir"]).read_config()
    if settings["fp16"]:
        settings["bf16"] = False
    elif precision == "no" or (precision in DTYPES and not settings["use_cpu"]):
        settings["bf16"] = precision == "bf16"
        settings["fp16"] = precision == "fp16"
    elif "bf16" in before:  # a run keeps its precision on whatever machine it is resumed
        settings["bf16"] = before["bf16"]
        settings["fp16"] = before.get("fp16", False)
    else:
        settings["bf16"] = has_fast_bf16("cpu" if settings["use_cpu"] else "cuda")


def _split_batch(settings: dict[str, Any], processes: int) -> None:
    """The largest batch up to `per_device_train_batch_size` that divides a process's share of `pairs_per_step`."""
    pairs = settings["pairs_per_step"]
    if pairs < 1 or pairs % processes:
        raise UserError(f"pairs_per_step is {pairs}, which {processes} process(es) cannot share evenly; change it")
    share = pairs // processes
    limit = min(share, settings["per_device_train_batch_size"])
    batch = max(size for size in range(1, limit + 1) if share % size == 0)
    accumulation = settings["gradient_accumulation_steps"]
    if accumulation not in (1, share // batch):
        raise UserError(f"gradient_accumulation_steps is {accumulation}, but pairs_per_step decides it; leave it out")
    settings["per_device_train_batch_size"] = batch
    settings["gradient_accumulation_steps"] = share // batch


def _get_mixed_precision(asked: dict[str, Any]) -> str | None:
    """The precision that the accelerate file or its launcher asks for, by accelerate's names; None for neither."""
    precision = asked.get("mixed_precision")
    if precision is None:
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        return None if launcher == "no" else launcher  # its default
    return precision or "no"  # YAML reads a bare no as false


def prepare_process(training_args: Any, model_args: Any, accelerate_config: str | None) -> None:
    """Before a training script loads anything: check what runs, print it, and tell TRL how to load models."""
    import torch
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _quiet_libraries()
    if training_args.hub_token:  # transformers would write it into training_args.bin
        os.environ["HF_TOKEN"] = training_args.hub_token
        training_args.hub_token = None
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # inherited from accelerate_configs/slurm.sbatch
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    check_launch(training_args, accelerate_config)
    if training_args.process_index == 0:
        print(describe_launch(training_args), flush=True)
    if training_args.use_cpu and torch.distributed.is_initialized():
        _set_pg_timeout(training_args.ddp_timeout_delta)  # transformers sets it for GPU processes only
    # In a half-precision run only the LM head multiplies in float32.
    if training_args.bf16 or training_args.fp16:
        torch.set_float32_matmul_precision("medium")
    else:
        torch.set_float32_matmul_precision("high" if training_args.tf32 else "highest")
    if training_args.dataloader_num_workers and sys.platform == "linux":
        # Python 3.14 starts workers from a fork server: SIGTERM would end it, and the workers with it.
        training_args.dataloader_multiprocessing_context = "fork"
    if training_args.device.type == "cuda":
        # Batches are in pinned memory: the host need not wait for each of their tensors.
        training_args.accelerator_config.non_blocking = True
    training_args.hub_strategy = "end"  # `train.push_run` pushes a run once, without files that hold local paths
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1  # or one process would take all GPUs (nn.DataParallel), each with its own batch
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "use_safetensors": True,  # never unpickle a stranger's weights
        "device_map": None,  # TRL's "auto" would spread the model over all GPUs that one process sees
        **(training_args.model_init_kwargs or {}),
    }


def _quiet_libraries() -> None:
    """Silence warnings that a user can do nothing about."""
    from transformers.utils import logging as transformers_logging

    # It warns of checkpoints written within the same second.
    transformers_logging.get_logger("transformers.trainer_utils").setLevel(logging.ERROR)
    # Of weights that share their values, as LM head and embedding do, a checkpoint holds one.
    trainer_logger = transformers_logging.get_logger("transformers.trainer")
    trainer_logger.addFilter(lambda record: "missing keys" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch.distributed")


def check_launch(training_args: Any, accelerate_config: str | None) -> None:
    """Refuse a run that differs from what the accelerate file, or else the launcher's environment, asks for."""
    asked = read_yaml(accelerate_config) if accelerate_config else {}
    file = accelerate_config or "the launcher"
    running = training_args.distributed_state.num_processes
    launched = int(os.environ.get("WORLD_SIZE", 1))
    needed = asked.get("num_processes", launched)
    if not running == launched == needed:  # accelerate started fewer, or independent ones
        raise UserError(
            f"{file} asks for {needed} processes, but this run has {running}; start with `accelerate launch` and the "
            "file's own num_processes, and on CPUs with `distributed_type: MULTI_GPU` and `use_cpu: true`, as "
            "accelerate_configs/multi_cpu.yaml does"
        )
    if training_args.use_cpu and asked.get("use_cpu") is False:
        raise UserError(f"{file} asks for a GPU and this run has none; use accelerate_configs/cpu.yaml")
    if training_args.use_cpu and asked.get("distributed_type") == "FSDP":
        raise UserError(f"{file} asks for FSDP, which does not shard on CPUs; use accelerate_configs/multi_cpu.yaml")
    _check_sharding(training_args, file)
    precision = _get_mixed_precision(asked)
    dtype = get_dtype(vars(training_args))
    if precision and DTYPES.get(precision, precision) != dtype:
        same = f", or ask for the same with {PRECISION_FLAGS[precision]}" if precision in PRECISION_FLAGS else ""
        raise UserError(
            f"{file} asks for mixed_precision {precision} and this run uses {dtype}; take mixed_precision out of the "
            f"accelerate file{same}"
        )


def _check_sharding(training_args: Any, file: str) -> None:
    """Refuse settings under which a sharded run would end without its model, or with a wrong one."""
    sharding = _get_sharding()
    if sharding == "ZeRO-3" and getattr(training_args, "precompute_ref_log_probs", False):
        raise UserError(
            "precompute_ref_log_probs is True, but under ZeRO-3 their cache cannot distinguish references; "
            "pass --precompute_ref_log_probs false"
        )
    needed = {"FSDP2": FSDP_NEEDS, "ZeRO-3": ZERO3_NEEDS}.get(sharding, {})
    for variable, value in needed.items():
        if os.environ.get(variable, "false").lower() != value.lower():
            key = variable.removeprefix("ACCELERATE_DEEPSPEED_").lower()
            raise UserError(f"{file} needs {key}: {value}; see accelerate_configs/fsdp.yaml and zero3.yaml")


def describe_launch(training_args: Any) -> str:
    """What runs, in one line: processes, sharding, device, dtype, pairs per step."""
    processes = training_args.distributed_state.num_processes
    batch = training_args.per_device_train_batch_size
    accumulation = training_args.gradient_accumulation_steps
    sharding = _get_sharding()
    line = f"{processes} process" if processes == 1 else f"{processes} processes"
    if sharding:
        line += f" ({sharding})"
    line += f" on {training_args.device.type}, {get_dtype(vars(training_args))}"
    if training_args.use_cpu and training_args.bf16 and not has_fast_bf16("cpu"):
        line += " (slow on this CPU; --bf16 false is faster)"
    return f"{line}, {processes * batch * accumulation} pairs per step ({batch} at a time x {accumulation})"


def _get_sharding() -> str | None:
    """What splits the model over processes, by the launcher's environment."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return "FSDP2" if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def count_cores() -> int:
    """How many CPU cores this process may keep busy: those it may run on, or in a container its quota of time."""
    # Linux counts cpusets here (Slurm, `docker --cpuset-cpus`), and no quotas; macOS has no such call.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or "max": no limit
        return allowed
    return max(1, min(allowed, math.ceil(quota / period)))


def get_dtype(settings: dict[str, Any]) -> str:
    """What a run with these settings computes in, by torch's names; "auto" where they leave it to the machine."""
    if settings.get("fp16"):
        return "float16"
    if settings.get("bf16") is None:
        return "auto"
    return "bfloat16" if settings["bf16"] else "float32"


def pick_device_and_dtype(dtype: str) -> tuple[str, Any]:
    """Where evaluation runs, and what it computes in: a dtype's name, or "auto" for what training would use."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(device) else "float32"
    return device, getattr(torch, dtype)
