"""Adapters, quantized bases and the 8-bit optimizer: that they train, merge and evaluate, and what is refused."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from running import log, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, set_seed

from tinydpo.errors import UserError
from tinydpo.models.loading import hash_weights, load_model, merge_adapter
from tinydpo.training import train as runs

pytestmark = pytest.mark.usefixtures("one_thread")
LORA, QLORA, ADAM8 = (
    ["--config", f"recipes/gpt2-medium-hh/{name}.yaml", "--dataloader_num_workers", "0", "--warmup_steps", "0"]
    for name in ("dpo-lora", "dpo-qlora", "dpo-adamw8bit")
)
IDS = torch.arange(40).reshape(2, 20)


def script(name: str, *argv: str | Path) -> None:
    importlib.import_module(name).main([*map(str, argv)])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def dpo(model: Path, task: Path, folder: Path, *flags: str) -> Any:
    """Train through scripts/dpo.py, evaluate on the way, and return the trainer."""
    trainers, train = [], runs.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", lambda trainer, *rest: trainers.append(trainer) or train(trainer, *rest))
        run("dpo", "--model_name_or_path", model, "--dataset_name", task / "data", "--output_dir", folder,
            "--max_steps", "3", "--eval_steps", "2", "--save_steps", "1", "--save_total_limit",
            "9", *flags)  # fmt: skip
    return trainers[0]


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2, in a folder whose weights a test may look at but not change."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("adapters") / "base"))


@pytest.fixture(scope="module")
def llama(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: no biases, so that a quantized layer's lost gradients raise no error."""
    folder, end = tmp_path_factory.mktemp("llama"), tiny_tokenizer.eos_token_id
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=192, bos_token_id=end,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(base: Path, task: Path) -> Any:
    """A trained adapter's trainer; its folder is `args.output_dir`."""
    return dpo(base, task, base.parent / "lora", *LORA, "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def adapter(lora: Any) -> Path:
    return Path(lora.args.output_dir)


def test_adapters_of_conv1d_train_and_the_base_stays(lora: Any, adapter: Path, base: Path):
    first, last = (load_file(folder / "adapter_model.safetensors") for folder in (adapter / "checkpoint-1", adapter))
    layers = {name.rsplit(".lora_", 1)[0] for name in last}
    assert len(layers) == 8, f"2 blocks of 4 Conv1D have other adapters: {sorted(layers)}"
    for name, weight in last.items():  # A's gradient is 0 as long as B is, in the first step
        assert not weight.equal(first[name]) and weight.abs().sum() > 0, f"{name} does not train"
    weights = load_file(base / "model.safetensors")
    trained = {name.replace(".base_layer", ""): w for name, w in lora.model.get_base_model().state_dict().items()}
    for name, weight in weights.items():
        assert trained[name].equal(weight), f"training an adapter changed the base's {name}"
    assert (logits(lora.model) - logits(load_model(str(base)))).abs().max() > 1e-2, "the adapter changes no answer"


def test_merged_is_a_plain_checkpoint_with_the_adapters_outputs(adapter: Path, base: Path, tmp_path: Path, capsys):
    script("merge", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    assert "quantized" not in capsys.readouterr().out
    together = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain) is GPT2LMHeadModel and plain.dtype == torch.float32
    torch.testing.assert_close(logits(plain), logits(together), rtol=1e-5, atol=1e-5, msg="merging changes answers")
    assert logits(load_model(str(adapter))).equal(logits(plain)), "evaluation would see another model than the merged"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
        == AutoTokenizer.from_pretrained(base).get_vocab()
    )
    assert plain.generation_config.top_k == 0, "sampling from the merged model cuts the distribution at 50 tokens"
    assert plain.generation_config.eos_token_id == plain.config.eos_token_id
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert not any("adapter" in name or name.endswith(".bin") for name in names), f"not a plain checkpoint: {names}"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "partial files are left behind"


def test_the_merged_model_trains_on(adapter: Path, task: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"is an adapter.*scripts/merge\.py --model_name_or_path"):
        dpo(adapter, task, tmp_path / "run")
    script("merge", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    again = dpo(tmp_path / "merged", task, tmp_path / "run", *LORA)
    assert log(tmp_path / "run", "loss")[0] == pytest.approx(0.6931, abs=1e-3), "the reference is not the merged model"
    together = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "run")
    torch.testing.assert_close(logits(again.model), logits(together), rtol=1e-5, atol=1e-5)


def other_base(base: Path, folder: Path, tokenizer: Any = None, **config: Any) -> Path:
    """The base's folder with another model in it, and another tokenizer where one is given."""
    set_seed(1)
    settings = json.loads((base / "config.json").read_text()) | config
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(shutil.copytree(base, folder, dirs_exist_ok=True))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def forget_hash(adapter: Path) -> None:
    """As if the adapter came from elsewhere."""
    (adapter / "environment.json").unlink()


def retrained(adapter: Path, base: Path) -> Path:
    return other_base(base, base.parent / "retrained")


def wider(adapter: Path, base: Path) -> Path:
    forget_hash(adapter)
    return other_base(base, base.parent / "wider", n_embd=80)


def deeper(adapter: Path, base: Path) -> Path:
    forget_hash(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn", "c_proj", "c_fc"]  # all-linear names each layer: it fits whatever has them
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return other_base(base, base.parent / "deeper", n_layer=3)


def shallower(adapter: Path, base: Path) -> Path:
    forget_hash(adapter)
    return other_base(base, base.parent / "shallower", n_layer=1)


def other_vocabulary(adapter: Path, base: Path) -> Path:
    forget_hash(adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<unheard-of>"])
    return other_base(base, base.parent / "vocabulary", tokenizer, vocab_size=len(tokenizer))


def quantized(adapter: Path, base: Path) -> Path:
    folder = Path(shutil.copytree(base, base.parent / "quantized"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gone(adapter: Path, base: Path) -> Path:
    return base.parent / "gone"


def pickled(adapter: Path, base: Path) -> Path:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return base


def of_nan(adapter: Path, base: Path) -> Path:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: w * float("nan") for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    return base


def no_adapter(adapter: Path, base: Path) -> Path:
    (adapter / "adapter_config.json").unlink()
    return base


REFUSED: dict[Callable, str] = {
    retrained: r"base \S+ has other weights than adapter \S+ was trained on",
    wider: r"adapter \S+ does not fit the base \S+ \(.*size mismatch",
    deeper: r"adapter \S+ does not fit the base \S+: only one of the two has \S*h\.2\.",
    shallower: r"adapter \S+ does not fit the base \S+: only one of the two has \S*h\.1\.",
    other_vocabulary: r"base \S+ has another vocabulary than adapter \S+ \(token '<unheard-of>' differs",
    quantized: r"base \S+ is quantized; merge adapter \S+ into the same weights in full precision",
    gone: r"no model '\S+gone' on the Hub and no such local path",
    pickled: r"has no adapter_model\.safetensors; pickled weights are not read",
    of_nan: r"does not fit the base \S+ \(NaNs detected",
    no_adapter: r"is no adapter: there is no adapter_config\.json",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_an_adapter_on_the_wrong_base_is_one_sentence(spoil: Callable, adapter: Path, base: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "lora", ignore=shutil.ignore_patterns("checkpoint-*")))
    there = spoil(copy, Path(shutil.copytree(base, tmp_path / "base")))
    flags = ["--base_model_name_or_path", there, "--output_dir", tmp_path / "merged"]
    with pytest.raises(UserError, match=REFUSED[spoil]) as error:
        script("merge", "--model_name_or_path", copy, *flags)
    assert "\n" not in str(error.value), "more than one sentence"
    assert not (tmp_path / "merged").exists(), "something was written all the same"


def test_evaluation_refuses_what_merging_refuses(adapter: Path, base: Path, tmp_path: Path):
    copy = Path(shutil.copytree(adapter, tmp_path / "lora"))
    pickled(copy, base)
    with pytest.raises(UserError, match="pickled weights are not read"):
        load_model(str(copy))


def test_merge_writes_over_nothing(adapter: Path, tmp_path: Path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match=r"output_dir \S+ exists and is not empty"):
        script("merge", "--model_name_or_path", adapter, "--output_dir", tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("shared_prefix", ["true", "false"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_qlora_trains_after_a_reference_pass_and_evaluations(
    family: str, shared_prefix: str, base: Path, llama: Path, task: Path, tmp_path: Path
):
    from bitsandbytes.nn import Linear4bit

    trainer = dpo(
        {"gpt2": base, "llama": llama}[family], task, tmp_path / "run", *QLORA, "--shared_prefix", shared_prefix
    )
    layers = [m for m in trainer.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == {"gpt2": 8, "llama": 14}[family], "not every layer is in 4 bits"
    assert all(m.weight.dtype == torch.uint8 and m.weight.quant_state.quant_type == "nf4" for m in layers)
    assert min(log(tmp_path / "run", "grad_norm")) > 1e-3, "no gradient reaches the adapter"
    assert log(tmp_path / "run", "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ at first"
    assert len(log(tmp_path / "run", "eval_loss")) >= 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "beta 0.1; a LoRA adapter of rank 16 on the base in 4 bits" in card, "the card tells of a whole model"
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(w.abs().sum() > 0 for name, w in weights.items() if "lora_B" in name), "an adapter does not train"
    assert not any(m.support_avx512bf16_for_cpu for m in layers), "evaluation may repack layers, then gradients are 0"


def test_a_qlora_policy_is_evaluated_and_merged(base: Path, task: Path, tmp_path: Path, capsys):
    dpo(base, task, tmp_path / "run", *QLORA, "--learning_rate", "1e-2")
    script("evaluate", "--model_name_or_path", tmp_path / "run", "--ref_model_name_or_path", base, "--dataset_name",
           task / "data", "--output_dir", tmp_path / "evaluation", "--num_prompts", "4")  # fmt: skip
    results = json.loads((tmp_path / "evaluation/eval_results.json").read_text())
    assert results["pairs"] == 32 and results["kl_per_sequence"] != 0, "policy and reference are the same"
    script("merge", "--model_name_or_path", tmp_path / "run", "--output_dir", tmp_path / "merged")
    assert "its base was quantized" in capsys.readouterr().out, "the rounding that merging changes is not told"
    policy, plain = (logits(load_model(str(folder))) for folder in (tmp_path / "merged", base))
    assert (policy - plain).abs().max() > 1e-2, "the merged policy is the base"


def test_8_bit_adam_trains_and_keeps_8_bits(base: Path, task: Path, tmp_path: Path):
    trainer = dpo(base, task, tmp_path / "run", *ADAM8, "--learning_rate", "3e-3", "--max_steps", "8")
    losses = log(tmp_path / "run", "loss")
    assert losses[-1] < losses[0] - 0.01, f"it does not learn: {losses}"
    moments = [state["state1"].dtype for state in trainer.optimizer.state.values()]
    assert moments.count(torch.uint8) == 8, "a matrix of the blocks has moments of more than 8 bits"


def test_the_record_of_a_base_is_its_weights(adapter: Path, base: Path, tmp_path: Path):
    assert json.loads((adapter / "environment.json").read_text())["base_sha256"] == hash_weights(base)
    assert hash_weights(other_base(base, tmp_path / "other")) != hash_weights(base)
    assert logits(merge_adapter(adapter, str(shutil.copytree(base, tmp_path / "moved")))).equal(
        logits(merge_adapter(adapter))
    )
