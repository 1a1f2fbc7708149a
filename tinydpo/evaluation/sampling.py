"""Answers sampled from a model to held-out prompts.

Prompts are padded on the left and sorted by length. An answer ends at its first stop token, which stays: a policy that
has learned to stop differs from its reference there more than anywhere else. What follows is padding, whatever its id
(GPT-2 pads with its end token).
"""

import contextlib
import json
import logging
import random
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import hash_module, pad

from tinydpo.data.fitting import decode_completions, get_bos_ids, tokenize_prompts
from tinydpo.files import write_json
from tinydpo.models.precision import get_compute_dtype
from tinydpo.models.stop_tokens import get_stop_token_ids

# `generate` drops a mask of ones (equally long prompts), and then takes finished answers for padding without a mask.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "may be padded" not in record.getMessage())


class Answers(NamedTuple):
    """One sampled answer to each of n prompts."""

    ids: list[list[int]]  # each up to its first stop token, which stays
    ended: list[bool]  # whether the model wrote a stop token before it ran out of room

    def decode(self, texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answers to rows of `texts` without the stop token (special or not) and other special tokens."""
        content = [ids[:-1] if ended else ids for ids, ended in zip(self.ids, self.ended, strict=True)]
        return decode_completions(content, texts["templated"][:], tokenizer)


def prepare_prompts(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_prompts: int, seed: int
) -> tuple[Dataset, list[list[int]]]:
    """Choose rows of `texts` (`FittedSplit.texts`), and cut their prompts' ids to leave room for `max_length // 2`."""
    rows = choose_prompts(texts, num_prompts, seed)
    bos_token_id = next(iter(get_bos_ids(tokenizer)), None)  # only if fitting keeps it
    prompts = tokenize_prompts(rows, tokenizer)[0]
    return rows, [cut_prompt(ids, max_length - max_length // 2, bos_token_id) for ids in prompts]


def choose_prompts(texts: Dataset, num_prompts: int, seed: int) -> Dataset:
    """At most `num_prompts` rows with distinct `prompt`s: a seeded random choice, in the order of `texts`."""
    first_row: dict[str, int] = {}
    for row, prompt in enumerate(texts["prompt"][:]):
        first_row.setdefault(prompt, row)
    rows = list(first_row.values())
    if len(rows) > num_prompts:
        rows = sorted(random.Random(seed).sample(rows, num_prompts))
    return texts.select(rows)


def cut_prompt(ids: list[int], max_tokens: int, bos_token_id: int | None) -> list[int]:
    """The last `max_tokens` tokens of a prompt; a BOS token at the start is kept."""
    if len(ids) <= max_tokens:
        return ids
    if bos_token_id is not None and ids[0] == bos_token_id and max_tokens > 1:
        return [bos_token_id, *ids[-(max_tokens - 1) :]]
    return ids[-max_tokens:]


def sample_cached(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    desc: str = "sampling",
    weights: str | None = None,
    **settings: Any,
) -> Answers:
    """`sample_answers`, cached by weights (their `hash_module`), dtype, device, prompts and settings."""
    stops = sorted(get_stop_token_ids(model, tokenizer))
    kind = (weights or hash_module(model), str(get_compute_dtype(model)), model.device.type, stops)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    key = Hasher.hash((kind, prompts, max_new_tokens, sorted(settings.items())))
    path = Path(datasets.config.HF_DATASETS_CACHE) / "tinydpo-answers" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # missing or damaged
        return Answers(**json.loads(path.read_text()))
    answers = sample_answers(model, tokenizer, prompts, max_new_tokens, desc=desc, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, answers._asdict())
    return answers


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    desc: str = "sampling",
) -> Answers:
    """Sample one answer to each prompt, by default from the model's own distribution.

    `max_new_tokens` include the stop token; `top_k` 0 and `top_p` 1 keep all tokens. `seed` sets torch's global random
    state; changing `batch_size` changes the order of random numbers, and so the samples.
    """
    stops = get_stop_token_ids(model, tokenizer)
    pad_token_id = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False}  # at temperature 0: the likeliest token every time
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_token_id, **sampling)
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, tuple[list[int], bool]] = {}
    torch.manual_seed(seed)
    # transformers fills what a GenerationConfig leaves out from the checkpoint's own (Qwen2's repetition_penalty 1.1,
    # an instruct model's min_p …), and then the samples are not the policy's.
    checkpoint_config = model.generation_config
    model.generation_config = config
    try:
        for start in tqdm(range(0, len(prompts), batch_size), desc=desc, leave=False, disable=None):
            rows = longest_first[start : start + batch_size]
            inputs = [torch.tensor(prompts[i]) for i in rows]
            input_ids = pad(inputs, pad_token_id, padding_side="left").to(model.device)
            attention_mask = pad([torch.ones_like(ids) for ids in inputs], 0, padding_side="left").to(model.device)
            output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
            for i, generated in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(generated, 1) if token in stops), None)
                answers[i] = (generated[:length], length is not None)
    finally:
        model.generation_config = checkpoint_config
    in_order = [answers[i] for i in range(len(prompts))]
    return Answers([ids for ids, _ in in_order], [ended for _, ended in in_order])
