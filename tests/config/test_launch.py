"""Device, precision and batch: what is unset is filled, and what runs is what the accelerate file asked for."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from running import FAST_BF16, ROOT

from tinydpo.config import launch as machine
from tinydpo.errors import UserError

LAUNCHER = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")
SHARDED = {  # what accelerate's launcher sets for the shipped files
    "FSDP": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    "DEEPSPEED": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*LAUNCHER, *SHARDED["FSDP"], *SHARDED["DEEPSPEED"]):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in FAST_BF16:
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture
def gpu(monkeypatch, no_gpu):
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


def filled(**given: object) -> Namespace:
    unset = {
        "accelerate_config": None, "use_cpu": False, "bf16": None, "fp16": False, "pairs_per_step": None,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    namespace = Namespace(**{**unset, **given})
    machine.fill_defaults(namespace)
    return namespace


def running(processes: int = 1, kind: str = "NO", **given: object) -> SimpleNamespace:
    """Training arguments of a run that started."""
    state = SimpleNamespace(num_processes=processes, distributed_type=SimpleNamespace(value=kind))
    args = {"use_cpu": True, "bf16": False, "fp16": False, "device": torch.device("cpu"), "process_index": 0}
    args |= {"save_only_model": False, "hub_token": None, "tf32": None}
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    return SimpleNamespace(distributed_state=state, **{**args, **batch, **given})


def refusal(args: SimpleNamespace, file: str | None) -> str:
    with pytest.raises(UserError) as caught:
        machine.check_launch(args, file)
    return str(caught.value)


# Filling


def test_without_a_gpu_it_is_the_cpu_in_float32():
    got = filled()
    assert (got.use_cpu, got.bf16, got.fp16) == (True, False, False), "TRL's default of bf16 would be an error here"


@pytest.mark.parametrize(("capability", "bf16"), [(7, False), (8, True), (9, True), (12, True)])
def test_a_gpu_computes_in_bf16_from_capability_8_on(gpu, capability: int, bf16: bool):
    gpu(capability)
    got = filled()
    assert (got.use_cpu, got.bf16, got.fp16) == (False, bf16, False)


@pytest.mark.parametrize("has", FAST_BF16)
def test_a_cpu_computes_in_bf16_where_it_has_it(has: str, monkeypatch):
    monkeypatch.setattr(torch.cpu, has, lambda: True)
    assert filled().bf16 is True, "a CPU that is fast in bf16 computes slower than it could"
    assert filled(bf16=False).bf16 is False, "--bf16 false does not give float32"
    assert machine.pick_device_and_dtype("auto") == ("cpu", torch.bfloat16), (
        "evaluation computes otherwise than training"
    )
    assert "bfloat16," in machine.check_launch(running(bf16=True), None), "the line calls a fast precision slow"


def test_bf16_asked_for_on_a_cpu_without_it_is_told_to_be_slow():
    assert "bfloat16 (slow on this CPU; --bf16 false is faster)" in machine.check_launch(running(bf16=True), None)


def test_a_run_goes_on_in_the_precision_it_began_in(tmp_path: Path, monkeypatch):
    """Begun where bf16 is fast, and taken up where it is not; and the other way round."""
    (tmp_path / "run_config.yaml").write_text("bf16: true\nfp16: false\n")
    assert filled(output_dir=str(tmp_path)).bf16 is True, "a run goes on in another precision, and by itself"
    assert filled(output_dir=str(tmp_path), bf16=False).bf16 is False, "what the user sets is not what is compared"
    (tmp_path / "run_config.yaml").write_text("bf16: false\nfp16: false\n")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert filled(output_dir=str(tmp_path)).bf16 is False, "a run goes on in another precision, and by itself"


def test_what_the_user_set_stays(gpu):
    gpu(9)
    assert filled(bf16=False).bf16 is False
    fp16 = filled(fp16=True)
    assert (fp16.bf16, fp16.fp16) == (False, True), "both would be an error of transformers'"
    cpu = filled(use_cpu=True)
    assert (cpu.use_cpu, cpu.bf16) == (True, False), "on a CPU bf16 is slower, and nobody asked for it"
    assert filled(use_cpu=True, bf16=True).bf16 is True


def test_the_accelerate_file_says_where(gpu, accelerate_file, monkeypatch):
    gpu(9)
    by_file = filled(accelerate_config=accelerate_file(use_cpu=True))
    assert (by_file.use_cpu, by_file.bf16) == (True, False), "the file's use_cpu is ignored"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # what `accelerate launch` makes of it
    by_launcher = filled()
    assert (by_launcher.use_cpu, by_launcher.bf16) == (True, False)


@pytest.mark.parametrize(
    ("asked", "bf16", "fp16"),
    [("bf16", True, False), ("fp16", False, True), ("no", False, False), (False, False, False)],
)
def test_the_accelerate_file_may_ask_for_a_precision(gpu, accelerate_file, asked: object, bf16: bool, fp16: bool):
    gpu(9)
    got = filled(accelerate_config=accelerate_file(mixed_precision=asked))
    assert (got.bf16, got.fp16) == (bf16, fp16), f"the file asks for {asked!r}"


def test_the_launchers_precision_counts_unless_it_is_its_default(gpu, monkeypatch):
    gpu(9)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # set by every `accelerate launch`
    assert filled().bf16 is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert (filled().bf16, filled().fp16) == (False, True)


@given(share=st.integers(1, 600), processes=st.integers(1, 16), most=st.integers(1, 128), accumulation=st.booleans())
def test_a_recipe_is_the_same_training_on_any_number_of_devices(share, processes, most, accumulation):
    pairs = share * processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(processes))
        got = filled(pairs_per_step=pairs, per_device_train_batch_size=most)
        batch, steps = got.per_device_train_batch_size, got.gradient_accumulation_steps
        if accumulation:  # the right one may be given
            given = {"per_device_train_batch_size": most, "gradient_accumulation_steps": steps}
            assert filled(pairs_per_step=pairs, **given).gradient_accumulation_steps == steps
    assert batch * steps * processes == pairs, "another number of pairs per step than the recipe's"
    assert batch <= most, "more at once than the recipe says fits"
    larger = [size for size in range(batch + 1, min(most, share) + 1) if share % size == 0]
    assert not larger, f"{batch} at a time, though {larger} fit and divide a device's {share}"


@pytest.mark.parametrize(
    ("processes", "given", "named"),
    [
        (1, {"pairs_per_step": 0}, "pairs_per_step"),
        (1, {"pairs_per_step": -4}, "pairs_per_step"),
        (3, {"pairs_per_step": 64}, "pairs_per_step"),
        (128, {"pairs_per_step": 64}, "pairs_per_step"),
        (1, {"pairs_per_step": 4, "per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        (1, {"pairs_per_step": 64, "gradient_accumulation_steps": 5}, "gradient_accumulation_steps"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(monkeypatch, processes: int, given: dict, named: str):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=named):
        filled(**given)


def test_without_pairs_per_step_the_batch_is_the_users():
    got = filled(per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert (got.per_device_train_batch_size, got.gradient_accumulation_steps) == (3, 5)


# Checking


def test_one_line_says_what_runs(monkeypatch):
    assert (
        machine.check_launch(running(), None) == "1 process (NO) on cpu, float32, 32 pairs per step (8 at a time x 4)"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    cuda = running(2, "MULTI_GPU", bf16=True, use_cpu=False, device=torch.device("cuda", 0))
    told = "2 processes (MULTI_GPU) on cuda, bfloat16, 64 pairs per step (8 at a time x 4)"
    assert machine.check_launch(cuda, None) == told


@pytest.mark.parametrize("kind", ["MULTI_CPU", "MULTI_GPU", "NO"])
def test_fewer_processes_than_asked_are_refused(accelerate_file, kind: str):
    file = accelerate_file(distributed_type=kind, num_processes=2, use_cpu=True)
    message = refusal(running(), file)
    assert file in message and "2 processes and 1 started" in message
    assert "multi_cpu.yaml" in message, f"no way out is named: {message}"


def test_processes_that_do_not_know_of_each_other_are_refused(accelerate_file, monkeypatch):
    """`use_cpu: false` without a GPU: independent runs that would race on the output folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = accelerate_file(distributed_type="MULTI_GPU", num_processes=2, use_cpu=False)
    assert "do not know of each other" in refusal(running(1), file)
    assert "do not know of each other" in refusal(running(1), None), "a bare `accelerate launch` can see this too"


def test_fsdp_on_cpus_is_refused(accelerate_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    file = accelerate_file(distributed_type="FSDP", num_processes=2, use_cpu=True)
    assert "does not shard on CPUs" in refusal(running(2, "MULTI_CPU"), file)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_that_does_not_happen_is_refused(accelerate_file, monkeypatch, kind: str):
    """Started by plain python, or by a launcher that took one process for none of it."""
    file, args = accelerate_file(distributed_type=kind), running(use_cpu=False)
    assert kind in refusal(args, file)
    for name, value in SHARDED[kind].items():
        monkeypatch.setenv(name, value)
    assert {"FSDP": "FSDP2", "DEEPSPEED": "ZeRO-3"}[kind] in machine.check_launch(args, file), (
        "the line does not say what runs"
    )


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false"),
        ("FSDP", "FSDP_VERSION", "1"),
        ("FSDP", "FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"),
        ("FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING", "true"),
    ],
)
def test_sharding_that_would_lose_the_model_is_refused(accelerate_file, monkeypatch, kind: str, name: str, value: str):
    """Some of these are accelerate's defaults: a file that leaves the key out must be told too."""
    for key, fine in {**SHARDED[kind], name: value}.items():
        monkeypatch.setenv(key, fine)
    message = refusal(running(use_cpu=False), accelerate_file(distributed_type=kind))
    key = name.removeprefix("ACCELERATE_DEEPSPEED_").lower()
    assert key in message and "accelerate_configs/" in message, f"neither the key nor an example is named: {message}"


@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp8"])
def test_a_precision_asked_for_and_not_used_is_refused(accelerate_file, monkeypatch, asked: str):
    message = refusal(running(), accelerate_file(mixed_precision=asked, use_cpu=True))
    assert asked in message and "float32" in message
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert asked in refusal(running(), None), (
        "transformers would train in the launcher's precision, the line says float32"
    )


def test_a_precision_used_and_not_asked_for_is_refused(accelerate_file):
    assert "mixed_precision no" in refusal(running(bf16=True), accelerate_file(mixed_precision="no"))
    assert "bfloat16" in machine.check_launch(running(bf16=True), accelerate_file(mixed_precision="bf16"))


def test_a_gpu_asked_for_and_missing_is_refused():
    message = refusal(running(), str(ROOT / "accelerate_configs/single_gpu.yaml"))
    assert "asks for a GPU" in message and "ACCELERATE=accelerate_configs/cpu.yaml" in message


def test_an_accelerate_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file 'missing\.yaml'"):
        filled(accelerate_config="missing.yaml")
    for text in ("- a", "a: [", ""):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(UserError, match=r"broken\.yaml"):
            filled(accelerate_config=str(tmp_path / "broken.yaml"))
    (tmp_path / "broken.yaml").write_text("num_processes: two")
    with pytest.raises(UserError, match=r"broken\.yaml: num_processes is .two."):
        machine.read_accelerate_config(str(tmp_path / "broken.yaml"))


def test_real_arguments_on_the_cpu(tmp_path: Path, capsys, monkeypatch):
    """From flags to the line, through transformers' own arguments."""
    from trl import DPOConfig, ModelConfig

    from tinydpo.config.arguments import DataArguments, RunArguments
    from tinydpo.config.recipe import parse_args

    file = str(ROOT / "accelerate_configs/cpu.yaml")
    argv = ["--output_dir", str(tmp_path), "--pairs_per_step", "12", "--accelerate_config", file]
    argv += ["--model_revision", "abc", "--model_init_kwargs", '{"use_cache": false}']
    _, run, training, model = parse_args(DataArguments, RunArguments, DPOConfig, ModelConfig, argv=argv)
    machine.prepare_process(training, model, run.accelerate_config)
    out = capsys.readouterr().out
    assert out == "1 process (NO) on cpu, float32, 12 pairs per step (6 at a time x 2)\n"
    assert training.model_init_kwargs["revision"] == "abc", "the pinned model would not be the one that trains"
    assert training.model_init_kwargs["use_safetensors"] is True, "weights could be unpickled"
    assert training.model_init_kwargs["use_cache"] is False, "the user's own model_init_kwargs are lost"
    assert training.mixed_precision == "no"


def test_one_process_takes_one_gpu(capsys):
    """Else transformers would spread one process over all GPUs, each with a batch of its own."""
    args = running(use_cpu=False, device=torch.device("cuda", 0), n_gpu=4, model_init_kwargs=None)
    model = SimpleNamespace(model_revision="main", dtype="float32", attn_implementation=None)
    machine.prepare_process(args, model, None)
    assert args._n_gpu == 1, "pairs per step would be 4 times what the line says"
    assert "32 pairs per step" in capsys.readouterr().out
