"""Tiny models that behave like the families people train: a chat template, its tokens, and a generation config."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel, set_seed

# Gemma's way: a begin token, and turns that end in a token which is not the end token.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
# Phi-3's way: besides, the end token closes the whole conversation.
PHI = GEMMA + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_turns(tokenizer: Any, template: str) -> Any:
    """The tokenizer with a chat template and its tokens; Gemma's and Phi's put a begin token before any text."""
    if template == CHATML:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    else:
        tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<start>", "<end>"]})
        begin = {"single": "<bos> $A", "special_tokens": [("<bos>", tokenizer.bos_token_id)]}
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**begin)
    tokenizer.chat_template = template
    return tokenizer


def stops_of(tokenizer: Any) -> list[int]:
    """What ends an answer of the family."""
    ends = ["<end>"] if tokenizer.bos_token == "<bos>" else []
    return sorted({tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)})


def write_family(base: Path, folder: Path, template: str, **generation: Any) -> Path:
    """A folder with `base`'s model, its tokenizer with `template`, and a generation config with all stop tokens."""
    tokenizer = with_turns(AutoTokenizer.from_pretrained(base), template)
    model = GPT2LMHeadModel.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config.update(eos_token_id=stops_of(tokenizer), bos_token_id=tokenizer.bos_token_id, **generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def steer(folder: Path, token: int, logit: float) -> None:
    """Have the model in a folder give one token this logit at every position, the others about 0."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    with torch.no_grad():
        weight = model.transformer.wte.weight[token]
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(logit * weight / weight.dot(weight))
    model.save_pretrained(folder)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A data set's folder whose train and test split hold the same rows."""
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_reward_model(base: Path, folder: Path, template: str | None) -> Any:
    """A folder with a random reward model and a tokenizer with or without a template; the model itself comes back."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer = with_turns(tokenizer, template) if template else tokenizer
    set_seed(0)
    model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()
