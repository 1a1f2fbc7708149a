"""What the benchmarks run on: pairs (the toy task's, where none are given) and models with random weights."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from tinydpo.config.arguments import DataArguments
from tinydpo.errors import UserError
from tinydpo.models.loading import load_tokenizer
from tinydpo.toy_task import write_task

SHAPES = {
    "gpt2-tiny": {"n_embd": 128, "n_layer": 2, "n_head": 2},
    "gpt2-small": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}


def load_tokenizer_and_data(
    data: DataArguments, name: str | None, model: str, folder: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer `name`, or the model's. Without a dataset, the toy task's data and tokenizer, written to `folder`.

    `data.dataset_name` is set to the toy task's folder in that case.
    """
    logging.disable_progress_bar()
    if data.dataset_name is None:
        write_task(folder / "data", folder / "base", seed=0)
        data.dataset_name = str(folder / "data")
        name = str(folder / "base")
    if name is None and model in SHAPES:
        raise UserError(f"--tokenizer_name is missing: {model} is a shape only; pass a tokenizer's folder or Hub id")
    return load_tokenizer(name or model)


def name_data(data: DataArguments) -> str:
    """What the tables call the pairs."""
    if data.dataset_name is None:
        return "the toy task's"
    return " + ".join(Path(source.name).name for source in data.sources())


def save_random_model(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """A model of GPT-2's shape `name`, or of that model folder's, with random weights; saved with the tokenizer."""
    config = GPT2Config(**SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
