"""Device, precision and batch: what is unset is filled in, and what runs is what the accelerate file asks for."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from running import FAST_BF16, ROOT
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import DPOConfig, ModelConfig

from tinydpo.config import launch
from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError

# What accelerate's launcher sets for the shipped files.
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}  # fmt: skip
GPU = {"use_cpu": False}


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch):
    """No launcher, no GPU, and a CPU that is slow in bf16."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in FAST_BF16:
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture
def gpu(monkeypatch, plain_cpu):
    def of_capability(major: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))

    return of_capability


@pytest.fixture
def accelerate_file(tmp_path: Path):
    def write(**keys: object) -> str:
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 1, **keys}))
        return str(path)

    return write


def filled(**given: object) -> SimpleNamespace:
    unset = {
        "accelerate_config": None, "use_cpu": False, "bf16": None, "fp16": False, "pairs_per_step": None,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "output_dir": "no/run",
    }  # fmt: skip
    settings = {**unset, **given}
    launch.fill_defaults(settings)
    return SimpleNamespace(**settings)


def running(processes: int = 1, **given: object) -> SimpleNamespace:
    """Training arguments of a run that started."""
    args = {
        "distributed_state": SimpleNamespace(num_processes=processes), "use_cpu": True, "bf16": False, "fp16": False,
        "device": torch.device("cpu"), "process_index": 0, "hub_token": None, "tf32": None,
        "accelerator_config": AcceleratorConfig(),
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "dataloader_num_workers": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**args, **given})


@pytest.mark.parametrize(("capability", "bf16"), [(None, False), (7, False), (8, True), (12, True)])
def test_a_gpu_computes_in_bf16_from_capability_8_on(gpu, capability: int | None, bf16: bool):
    if capability:
        gpu(capability)
    got = filled()
    assert (got.use_cpu, got.bf16, got.fp16) == (capability is None, bf16, False), "TRL's default is bf16 everywhere"


@pytest.mark.parametrize("has", FAST_BF16)
def test_a_cpu_computes_in_bf16_where_it_is_fast(has: str, monkeypatch):
    assert "bfloat16 (slow on this CPU; --bf16 false is faster)" in launch.describe_launch(running(bf16=True))
    monkeypatch.setattr(torch.cpu, has, lambda: True)
    assert filled().bf16 is True, "a CPU that is fast in bf16 computes slower than it could"
    assert filled(bf16=False).bf16 is False, "--bf16 false does not give float32"
    assert launch.pick_device_and_dtype("auto") == ("cpu", torch.bfloat16), "evaluation differs from training"


def test_a_resumed_run_keeps_its_precision(tmp_path: Path):
    (tmp_path / "run_config.yaml").write_text("bf16: true\nfp16: false\n")
    assert filled(output_dir=str(tmp_path)).bf16 is True


@pytest.mark.parametrize(
    ("flags", "file", "expected"),
    [
        ({"bf16": False}, {}, (False, False, False)),
        ({"fp16": True}, {}, (False, False, True)),  # TRL's bf16 as well would be an error
        ({"use_cpu": True}, {}, (True, False, False)),  # bf16 is slower on this CPU, and nobody asked for it
        ({"use_cpu": True, "bf16": True}, {}, (True, True, False)),
        ({}, {"use_cpu": True}, (True, False, False)),
        ({}, {"mixed_precision": "bf16"}, (False, True, False)),
        ({}, {"mixed_precision": "fp16"}, (False, False, True)),
        ({}, {"mixed_precision": False}, (False, False, False)),  # a bare `no` in YAML
    ],
)
def test_flags_and_accelerate_file_decide_device_and_precision(
    gpu, accelerate_file, flags: dict, file: dict, expected: tuple
):
    gpu(9)
    got = filled(**flags, accelerate_config=accelerate_file(**file))
    assert (got.use_cpu, got.bf16, got.fp16) == expected


@given(share=st.integers(1, 600), processes=st.integers(1, 16), limit=st.integers(1, 128))
def test_a_recipe_is_the_same_training_on_any_number_of_devices(share: int, processes: int, limit: int):
    pairs = share * processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(processes))
        got = filled(pairs_per_step=pairs, per_device_train_batch_size=limit)
    batch = got.per_device_train_batch_size
    assert batch * got.gradient_accumulation_steps * processes == pairs, "a different number of pairs per step"
    assert batch <= limit, "more at once than the recipe says fits"
    larger = [size for size in range(batch + 1, min(limit, share) + 1) if share % size == 0]
    assert not larger, f"{batch} at a time, though {larger} fit and divide a device's {share}"


def test_pairs_that_cannot_be_shared_are_refused(monkeypatch):
    with pytest.raises(UserError, match="gradient_accumulation_steps is 5"):
        filled(pairs_per_step=64, gradient_accumulation_steps=5)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="pairs_per_step is 64"):
        filled(pairs_per_step=64)


def test_one_line_says_what_runs(monkeypatch):
    assert launch.describe_launch(running()) == "1 process on cpu, float32, 32 pairs per step (8 at a time x 4)"
    on_gpus = running(2, bf16=True, use_cpu=False, device=torch.device("cuda", 0))
    line = "2 processes on cuda, bfloat16, 64 pairs per step (8 at a time x 4)"
    assert launch.describe_launch(on_gpus) == line
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launch.describe_launch(on_gpus) == line.replace("processes", "processes (FSDP2)")


@pytest.mark.parametrize(
    ("file", "environment", "run", "message"),
    [
        ({"num_processes": 2, "use_cpu": True}, {}, {}, "2 processes, but this run has 1.*multi_cpu.yaml"),
        (None, {"WORLD_SIZE": "2"}, {}, "2 processes, but this run has 1"),  # they would race on the output folder
        ({"use_cpu": False}, {}, {}, "asks for a GPU"),
        ({"distributed_type": "FSDP", "use_cpu": True}, {}, {}, "does not shard on CPUs"),
        ({}, {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}, GPU, "zero3_save_16bit_model: true"),
        ({}, ZERO3, {**GPU, "precompute_ref_log_probs": True}, "--precompute_ref_log_probs false"),
        ({}, {**FSDP, "FSDP_VERSION": "1"}, GPU, "fsdp_version: 2"),
        ({}, {**FSDP, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, GPU, "fsdp_state_dict_type: FULL_STATE_DICT"),
        ({}, {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, GPU, "fsdp_cpu_ram_efficient_loading: false"),
        ({"mixed_precision": "bf16"}, {}, {}, "bf16 and this run uses float32"),
        ({"mixed_precision": "no"}, {}, {"bf16": True}, "no and this run uses bfloat16"),
        (None, {"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "fp16 and this run uses float32"),
    ],
)
def test_a_run_that_is_not_what_was_asked_for_is_refused(
    accelerate_file, monkeypatch, file: dict | None, environment: dict, run: dict, message: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch.check_launch(running(**run), None if file is None else accelerate_file(**file))


@pytest.mark.parametrize("environment", [ZERO3, FSDP, {}])
def test_a_run_as_asked_for_is_let_through(accelerate_file, monkeypatch, environment: dict):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch.check_launch(running(**GPU, bf16=True), accelerate_file(mixed_precision="bf16"))


def test_real_arguments_on_the_cpu(tmp_path: Path, capsys):
    """From flags to the line, through transformers' own arguments."""
    file = str(ROOT / "accelerate_configs/cpu.yaml")
    argv = ["--output_dir", str(tmp_path), "--pairs_per_step", "12", "--accelerate_config", file]
    argv += ["--model_revision", "abc", "--model_init_kwargs", '{"use_cache": false}']
    _, run, training, model = parse_args(DataArguments, RunArguments, DPOConfig, ModelConfig, argv=argv)
    launch.prepare_process(training, model, run.accelerate_config)
    assert capsys.readouterr().out == "1 process on cpu, float32, 12 pairs per step (6 at a time x 2)\n"
    kwargs = training.model_init_kwargs
    assert kwargs["revision"] == "abc", "the pinned model would not be the one that trains"
    assert kwargs["use_safetensors"] is True, "weights could be unpickled"
    assert kwargs["device_map"] is None, "on a machine with several GPUs the model would be spread over them"
    assert kwargs["use_cache"] is False, "the user's own model_init_kwargs are lost"


def test_one_process_uses_one_gpu(tmp_path: Path):
    """Otherwise transformers would spread one process over all GPUs, each with a batch of its own."""
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    args._n_gpu = 4
    assert args.n_gpu == args.train_batch_size / args.per_device_train_batch_size == 4, "transformers counts elsewhere"
    model = SimpleNamespace(model_revision="main", dtype="float32", attn_implementation=None)
    launch.prepare_process(args, model, None)
    assert args.train_batch_size == args.per_device_train_batch_size, "pairs per step are 4 times what the line says"


def test_copies_to_a_gpu_are_not_waited_for():
    args = running(use_cpu=False, device=torch.device("cuda", 0), n_gpu=1, model_init_kwargs=None)
    launch.prepare_process(
        args, SimpleNamespace(model_revision="main", dtype="float32", attn_implementation=None), None
    )
    assert args.accelerator_config.non_blocking, "the host waits for the GPU at each tensor of a batch"
