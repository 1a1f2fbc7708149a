"""Device, precision and batch have one owner: the accelerate file says where, the recipe what, this module the rest.

TRL turns bf16 on by default, over the accelerate file and on machines without a GPU too; accelerate starts fewer
processes than asked, or independent ones, without a word. Here what the user left unset is filled in before TRL sees
it, and what runs is held against what the accelerate file asked for.
"""

import math
import os
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

from tinydpo.errors import UserError
from tinydpo.files import read_run_config
from tinydpo.models.precision import has_fast_bf16

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, in how many
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}  # by accelerate's names
SHARDING_FLAGS = ("fsdp", "fsdp_config", "deepspeed")  # flags that would go past the checks of this module


def fill_defaults(namespace: Namespace) -> None:
    """Fill `use_cpu`, `bf16`, the per-device batch and the accumulation where the user left them unset.

    Raises:
        UserError: if `pairs_per_step` cannot be split over the processes, or contradicts the accumulation, or a flag
            would shard the model.
    """
    import torch

    for flag in SHARDING_FLAGS:
        if getattr(namespace, flag, None):
            raise UserError(
                f"{flag} is {getattr(namespace, flag)}, but the accelerate file says what shards a model; start with "
                "accelerate_configs/fsdp.yaml, zero2.yaml or zero3.yaml (docs/scaling.md)"
            )
    asked = read_accelerate_config(namespace.accelerate_config)
    cpu = namespace.use_cpu or _flag("ACCELERATE_USE_CPU") or asked.get("use_cpu") is True
    gpu = torch.accelerator.is_available() and not cpu
    namespace.use_cpu = not gpu
    if namespace.bf16 is None:
        precision, begun = _precision(asked), read_run_config(getattr(namespace, "output_dir", None) or "")
        if precision in DTYPES and gpu and not namespace.fp16:
            namespace.bf16, namespace.fp16 = precision == "bf16", precision == "fp16"
        elif "bf16" in begun and not namespace.fp16:  # a run goes on as it began, on whatever machine
            namespace.bf16, namespace.fp16 = begun["bf16"], begun.get("fp16", False)
        else:
            namespace.bf16 = not namespace.fp16 and has_fast_bf16("cuda" if gpu else "cpu")
    if namespace.pairs_per_step is not None:
        _split_batch(namespace, int(os.environ.get("WORLD_SIZE", 1)))


def _split_batch(namespace: Namespace, processes: int) -> None:
    pairs, most = namespace.pairs_per_step, namespace.per_device_train_batch_size
    if most < 1:
        raise UserError(f"per_device_train_batch_size is {most}; it must be at least 1")
    if pairs < 1 or pairs % processes:
        raise UserError(f"pairs_per_step is {pairs}, which {processes} process(es) cannot share evenly; change it")
    share = pairs // processes
    batch = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    if namespace.gradient_accumulation_steps not in (1, share // batch):
        raise UserError(
            f"gradient_accumulation_steps is {namespace.gradient_accumulation_steps}, but pairs_per_step {pairs} on "
            f"{processes} process(es) with batches of {batch} needs {share // batch}; leave it out"
        )
    namespace.per_device_train_batch_size, namespace.gradient_accumulation_steps = batch, share // batch


def _precision(asked: dict[str, Any]) -> str | None:
    """The `mixed_precision` asked for: the file's, else the launcher's, whose "no" may also mean that nobody asked."""
    precision = asked.get("mixed_precision")
    if precision is None:
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        return None if launched == "no" else launched
    return "no" if precision is False else str(precision)  # YAML reads a bare no as false


def read_accelerate_config(accelerate_config: str | None) -> dict[str, Any]:
    """The accelerate file's keys; empty without a file."""
    if accelerate_config is None:
        return {}
    import yaml

    path = Path(accelerate_config)
    if not path.is_file():
        raise UserError(f"--accelerate_config: there is no file {accelerate_config!r}; see accelerate_configs/")
    try:
        asked = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{accelerate_config} is not valid YAML: {error}") from None
    if not isinstance(asked, dict):
        raise UserError(f"{accelerate_config} must hold `key: value` lines of accelerate's")
    if not isinstance(asked.get("num_processes", 1), int):
        raise UserError(f"{accelerate_config}: num_processes is {asked['num_processes']!r}, expected int")
    return asked


def check_launch(training_args: Any, accelerate_config: str | None) -> str:
    """Hold what runs against what the accelerate file asked for.

    Args:
        training_args: transformers' `TrainingArguments`, after it has set up the processes.
        accelerate_config: the file given to `accelerate launch`; without it only the launcher's environment is
            known, and a run of fewer processes than its file asked for cannot be told from one meant so.

    Returns:
        One line: processes, type, device, dtype, pairs per step.

    Raises:
        UserError: if the two differ.
    """
    state, asked = training_args.distributed_state, read_accelerate_config(accelerate_config)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    where = accelerate_config or "the launcher"
    if launched != state.num_processes:
        raise UserError(
            f"{where} started {launched} processes that do not know of each other (there is no GPU for them); set "
            "`use_cpu: true` in the accelerate file, as accelerate_configs/multi_cpu.yaml does"
        )
    if asked:
        processes, kind = asked.get("num_processes", 1), str(asked.get("distributed_type", "NO"))
        if processes != state.num_processes:
            raise UserError(
                f"{where} asks for {processes} processes and {state.num_processes} started; start with `accelerate "
                "launch`, and on CPUs use `distributed_type: MULTI_GPU` with `use_cpu: true`, as "
                "accelerate_configs/multi_cpu.yaml does"
            )
        if training_args.use_cpu and asked.get("use_cpu") is False:
            raise UserError(
                f"{where} asks for a GPU and this run has none; use accelerate_configs/cpu.yaml "
                "(make: ACCELERATE=accelerate_configs/cpu.yaml)"
            )
        if training_args.use_cpu and kind == "FSDP":
            raise UserError(
                f"{where} asks for FSDP, which does not shard on CPUs; use accelerate_configs/multi_cpu.yaml"
            )
        if kind in ("FSDP", "DEEPSPEED") and not _flag(f"ACCELERATE_USE_{kind}"):
            raise UserError(f"{where} asks for {kind} and this run is without; start it with `accelerate launch`")
    _check_sharding(where)
    precision = _precision(asked)
    if precision and DTYPES.get(precision, precision) != dtype:
        raise UserError(
            f"{where} asks for mixed_precision {precision} and this run uses {dtype}; take mixed_precision out of the "
            "accelerate file, or ask for the same with --bf16 true or --fp16 true"
        )
    kind = _sharding() or getattr(state.distributed_type, "value", state.distributed_type)
    slow = ""
    if training_args.use_cpu and dtype != "float32" and not has_fast_bf16("cpu"):
        slow = " (slow on this CPU; --bf16 false is faster)"
    plural = "es" if state.num_processes > 1 else ""
    batch, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    return (
        f"{state.num_processes} process{plural} ({kind}) on {training_args.device.type}, {dtype}{slow}, "
        f"{state.num_processes * batch * accumulation} pairs per step ({batch} at a time x {accumulation})"
    )


def _sharding() -> str | None:
    """What splits the model over processes, by the launcher's environment."""
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return f"FSDP{os.environ.get('FSDP_VERSION', 1)}" if _flag("ACCELERATE_USE_FSDP") else None


def _check_sharding(where: str) -> None:
    """Refuse settings, some of them accelerate's defaults, under which a run would end without its model or worse."""
    kind, lacks = _sharding(), None
    if kind == "ZeRO-3" and not _flag("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"):
        lacks = "zero3_save_16bit_model: true, without which no final model is saved"
    elif kind == "FSDP1":
        lacks = "fsdp_version: 2"
    elif kind == "FSDP2" and os.environ.get("FSDP_STATE_DICT_TYPE") != "FULL_STATE_DICT":
        lacks = "fsdp_state_dict_type: FULL_STATE_DICT, without which no final model is saved"
    elif kind == "FSDP2" and _flag("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        lacks = "fsdp_cpu_ram_efficient_loading: false, without which most ranks hold an empty reference model"
    for name, of in (("TP", "tensor"), ("CP", "context"), ("SP", "sequence")):
        if int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", 1)) > 1:
            raise UserError(f"{where} asks for {of} parallelism, untried with packed rows; shard by FSDP or DeepSpeed")
    if lacks:
        example = "zero3" if kind == "ZeRO-3" else "fsdp"
        raise UserError(f"{where} needs {lacks}; accelerate_configs/{example}.yaml has it")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def prepare_process(training_args: Any, model_args: Any, accelerate_config: str | None) -> None:
    """Before a training script loads anything: check what runs, say it in one line, and hand TRL how to load models.

    Raises:
        UserError: if what runs is not what the accelerate file asked for.
    """
    import warnings
    from logging import ERROR

    import torch
    from torch.distributed.distributed_c10d import _set_pg_timeout
    from transformers.utils import logging

    logging.get_logger("transformers.trainer_utils").setLevel(ERROR)  # on checkpoints of the same second: no matter
    # Of weights that share their values, as LM head and embedding do, a checkpoint holds one.
    logging.get_logger("transformers.trainer").addFilter(lambda record: "missing keys" not in record.getMessage())
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers|trl|torch.distributed"
    )  # not the user's
    logging.disable_progress_bar()  # loading and writing shards: bars of a blink between the lines that matter
    if training_args.hub_token:  # transformers would write it into training_args.bin
        os.environ["HF_TOKEN"], training_args.hub_token = training_args.hub_token, None
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # as inherited from a launcher made deaf to it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    line = check_launch(training_args, accelerate_config)
    if training_args.process_index == 0:
        print(line, flush=True)
    if training_args.use_cpu and torch.distributed.is_initialized():
        _set_pg_timeout(training_args.ddp_timeout_delta)  # transformers hands it to GPUs' processes only
    # Of what a run in half precision computes, only the LM head multiplies in float32.
    short = "medium" if training_args.bf16 or training_args.fp16 else "high" if training_args.tf32 else "highest"
    torch.set_float32_matmul_precision(short)
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1  # else one process takes all GPUs (nn.DataParallel), each with a batch of its own
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "use_safetensors": True,  # never unpickle a stranger's weights
        **(training_args.model_init_kwargs or {}),
    }


def count_cores() -> int:
    """How many CPU cores this process may keep busy: those it may run on, or in a container its quota of time."""
    # Not on macOS. Linux counts cpusets here, as Slurm and `docker --cpuset-cpus` set them, and no quotas.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, CPU_QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or "max": no limit
        return allowed
    return max(1, min(allowed, math.ceil(quota / period)))


def pick_device_and_dtype(dtype: str) -> tuple[str, Any]:
    """Where evaluation runs, the first GPU or else the CPU, and what its blocks compute in.

    Args:
        dtype: "float32", "bfloat16", or "auto" for what training would take there.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bf16(device) else "float32"
    return device, getattr(torch, dtype)
