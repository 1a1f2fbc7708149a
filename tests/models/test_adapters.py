"""Adapters, quantized bases and the 8-bit optimizer: that they train, merge and evaluate, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merge as merge_script
import pytest
import torch
from peft import PeftModel
from running import log, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, set_seed

from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import EvaluateArguments
from tinydpo.models.loading import hash_weights, load_model, load_tokenizer, merge_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--dataloader_num_workers", "0", "--warmup_steps", "0"]
LORA = ["--config", "recipes/gpt2-medium-hh/dpo-lora.yaml", *SHORT]
QLORA = ["--config", "recipes/gpt2-medium-hh/dpo-qlora.yaml", *SHORT]
IDS = torch.arange(40).reshape(2, 20)


def merge(*argv: str | Path) -> None:
    merge_script.main([*map(str, argv)])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def dpo(model: Path, task: Path, folder: Path, *flags: str) -> Any:
    """Train through scripts/dpo.py for three steps with an evaluation, and return the trainer."""
    trainers = []
    train = Trainer.train

    def remember(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(trainer)
        return train(trainer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", remember)
        run("dpo", "--model_name_or_path", model, "--dataset_name", task / "data", "--output_dir", folder,
            "--max_steps", "3", "--eval_steps", "2", "--save_steps", "1", "--save_total_limit", "9",
            *flags)  # fmt: skip
    return trainers[0]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2, in a folder of its own."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("adapters") / "base"))


@pytest.fixture(scope="module")
def lora(base: Path, task: Path) -> Any:
    """A trained adapter's trainer; its folder is `args.output_dir`."""
    return dpo(base, task, base.parent / "lora", *LORA, "--learning_rate", "1e-2", "--beta", "0.3")


@pytest.fixture(scope="module")
def adapter(lora: Any) -> Path:
    return Path(lora.args.output_dir)


def test_an_adapter_of_conv1d_trains_and_the_base_stays(lora: Any, adapter: Path, base: Path):
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (adapter / "checkpoint-1", adapter))
    assert len(last) == 16, f"2 blocks of 4 Conv1D have different adapters: {sorted(last)}"
    for name, weight in last.items():
        assert not weight.equal(first[name]) and weight.abs().sum() > 0, f"{name} does not train"
    trained = {name.replace(".base_layer", ""): w for name, w in lora.model.get_base_model().state_dict().items()}
    for name, weight in load_file(base / "model.safetensors").items():
        assert trained[name].equal(weight), f"training an adapter changed the base's {name}"
    record = json.loads((adapter / "environment.json").read_text())
    assert record["base_sha256"] == hash_weights(base), "the run does not record which weights it started from"


def test_merged_is_a_plain_checkpoint_that_trains_on(adapter: Path, base: Path, task: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"is an adapter.*scripts/merge\.py --model_name_or_path"):
        dpo(adapter, task, tmp_path / "refused")
    merge("--model_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    with pytest.raises(UserError, match="holds a model already"):
        merge("--model_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    together = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(plain) - logits(load_model(str(base)))).abs().max() > 1e-2, "the adapter changes no answer"
    torch.testing.assert_close(logits(plain), logits(together), rtol=1e-5, atol=1e-5, msg="merging changes answers")
    assert logits(load_model(str(adapter))).equal(logits(plain)), "evaluation would not see the merged model"
    dpo(tmp_path / "merged", task, tmp_path / "run", "--eval_strategy", "no")
    assert log(tmp_path / "run", "loss")[0] == pytest.approx(0.6931, abs=1e-3), "the reference is not the merged model"


def test_a_merged_checkpoint_keeps_the_settings_of_its_run(adapter: Path, tmp_path: Path):
    merge("--model_name_or_path", adapter / "checkpoint-2", "--output_dir", tmp_path / "merged")
    argv = ["--model_name_or_path", tmp_path / "merged", "--ref_model_name_or_path", "r", "--output_dir", "o"]
    (args,) = parse_args(EvaluateArguments, argv=[*map(str, argv)], defaults_from_run="model_name_or_path")
    assert (args.beta, args.max_length) == (0.3, 128), "evaluation would use its own defaults"
    load_tokenizer(str(tmp_path / "merged"))  # not refused as an unfinished run


def retrain(adapter: Path, base: Path) -> None:
    set_seed(1)
    GPT2LMHeadModel(GPT2Config.from_pretrained(base)).save_pretrained(base)


def quantize(adapter: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))


def pickle(adapter: Path, base: Path) -> None:
    (adapter / "run_config.yaml").unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


REFUSED: dict[Callable, str] = {
    retrain: r"base \S+ has different weights from those that adapter \S+ was trained on",
    quantize: r"base \S+ is quantized; merge adapter \S+ into the same weights in full precision",
    pickle: r"could not be loaded .*adapter_model\.safetensors",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_an_adapter_on_the_wrong_base_is_refused(spoil: Callable, adapter: Path, base: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint-*")))
    other = Path(shutil.copytree(base, tmp_path / "base"))
    spoil(copy, other)
    flags = ["--base_model_name_or_path", other, "--output_dir", tmp_path / "merged"]
    with pytest.raises(UserError, match=REFUSED[spoil]):
        merge("--model_name_or_path", copy, *flags)
    assert not (tmp_path / "merged").exists(), "something was written all the same"


def test_a_base_that_moved_is_named_by_a_flag(adapter: Path, base: Path, tmp_path: Path):
    moved = str(shutil.copytree(base, tmp_path / "moved"))
    assert logits(merge_adapter(adapter, moved)).equal(logits(merge_adapter(adapter)))


def test_qlora_trains_after_a_reference_pass_and_evaluations(
    base: Path, task: Path, tmp_path: Path, capsys, monkeypatch
):
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # so that it shows on every CPU
    trainer = dpo(base, task, tmp_path / "run", *QLORA, "--learning_rate", "1e-2")
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 8, "not every layer is in 4 bits"
    assert not any(m.support_avx512bf16_for_cpu for m in layers), "evaluation may repack layers, then gradients are 0"
    assert min(log(tmp_path / "run", "grad_norm")) > 1e-3, "no gradient reaches the adapter"
    assert log(tmp_path / "run", "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ at first"
    assert len(log(tmp_path / "run", "eval_loss")) >= 1
    merge("--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "merged")
    assert "The base was quantized" in capsys.readouterr().out, "the rounding that merging undoes is not mentioned"
    policy, plain = (logits(load_model(str(folder))) for folder in (tmp_path / "merged", base))
    assert (policy - plain).abs().max() > 1e-2, "the merged policy is the base"


def test_8_bit_adam_trains_and_keeps_8_bits(base: Path, task: Path, tmp_path: Path):
    flags = ["--optim", "adamw_8bit", "--learning_rate", "3e-3", "--max_steps", "4", "--eval_strategy", "no"]
    trainer = dpo(base, task, tmp_path / "run", *flags)
    losses = log(tmp_path / "run", "loss")
    assert min(losses) < losses[0] - 0.05, f"it does not learn: {losses}"
    moments = [state["state1"].dtype for state in trainer.optimizer.state.values()]
    assert moments.count(torch.uint8) >= 8, "a matrix of the blocks has moments of more than 8 bits"
