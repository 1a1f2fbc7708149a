"""Answers sampled from a model to held-out prompts.

Prompts are padded on the left and sorted by length. GPT-2 pads with its end token, so an answer ends at the first stop
token and what comes after is padding whatever its id: the stop token itself stays, because a policy that has learned
to stop differs from its reference there more than anywhere else.
"""

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.utils import hash_module

from tinydpo.data.fitting import get_bos_ids, tokenize_prompts
from tinydpo.files import write_json
from tinydpo.models.precision import get_compute_dtype
from tinydpo.models.stop_tokens import get_stop_token_ids


class Answers(NamedTuple):
    """One sampled answer to each of n prompts.

    ids: n token lists, cut after the first stop token, which stays.
    ended: n flags, whether the model wrote that stop token before it ran out of room.
    """

    ids: list[list[int]]
    ended: list[bool]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The answers in words: without the stop token, be it a special one or not, and without special tokens."""
        said = [ids[: len(ids) - ended] for ids, ended in zip(self.ids, self.ended, strict=True)]
        return tokenizer.batch_decode(said, skip_special_tokens=True)


def choose_prompts(texts: Dataset, num_prompts: int, seed: int) -> Dataset:
    """The rows of `texts` with distinct `prompt`s, a seeded random `num_prompts` of them where there are more.

    Args:
        texts: rows with at least the column `prompt` (str).
        num_prompts: the most rows wanted.
        seed: the same seed picks the same rows.

    Returns:
        At most `num_prompts` rows, in the order of `texts`.
    """
    first_row: dict[str, int] = {}
    for row, prompt in enumerate(texts["prompt"][:]):
        first_row.setdefault(prompt, row)
    rows = list(first_row.values())
    if len(rows) > num_prompts:
        rows = sorted(random.Random(seed).sample(rows, num_prompts))
    return texts.select(rows)


def cut_prompt(ids: list[int], max_tokens: int, bos_token_id: int | None) -> list[int]:
    """The last `max_tokens` tokens of a prompt; a begin token that stands first stays first."""
    if len(ids) <= max_tokens:
        return ids
    if bos_token_id is not None and ids[0] == bos_token_id and max_tokens > 1:
        return [bos_token_id, *ids[-(max_tokens - 1) :]]
    return ids[-max_tokens:]


def cut_answer(ids: list[int], stops: Collection[int]) -> tuple[list[int], bool]:
    """A generated row up to its first stop token (kept), and whether it has one."""
    end = next((place for place, token in enumerate(ids, 1) if token in stops), None)
    return ids[:end], end is not None


def prepare_prompts(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, num_prompts: int, seed: int
) -> tuple[Dataset, list[list[int]]]:
    """Held-out prompts, each cut to its last `max_length - max_length // 2` tokens: the rest is room for an answer.

    Args:
        texts: rows as `pairs.FittedSplit.texts` has them.
        tokenizer: the policy's.
        max_length: tokens of prompt and answer together.
        num_prompts: the most prompts wanted; which ones `seed` picks.
        seed: as in `choose_prompts`.

    Returns:
        The chosen rows of `texts`, and the token list of each one's prompt.
    """
    rows = choose_prompts(texts, num_prompts, seed)
    bos = next(iter(get_bos_ids(tokenizer)), None)  # as fitting keeps it, not every token that a tokenizer calls so
    return rows, [cut_prompt(ids, max_length - max_length // 2, bos) for ids in tokenize_prompts(rows, tokenizer)[0]]


def sample_cached(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    desc: str = "sampling",
    weights: str | None = None,
    **settings: Any,
) -> Answers:
    """`sample_answers`, or what it gave before for the same weights, dtype, device, prompts and settings.

    The answers lie in the cache folder of `datasets`, beside the reference's log-probs. Who asks often passes the
    model's `hash_module` as `weights`: it reads all of them.
    """
    stops = sorted(get_stop_token_ids(model, tokenizer))
    kind = (weights or hash_module(model), str(get_compute_dtype(model)), model.device.type, stops)
    key = Hasher.hash((kind, prompts, max_new_tokens, sorted(settings.items())))
    path = Path(datasets.config.HF_DATASETS_CACHE) / "tinydpo-answers" / f"{key}.json"
    try:
        return Answers(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there yet, or damaged
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
    """One answer to each prompt, sampled from the model's own distribution unless the last arguments reshape it.

    Args:
        model: a causal LM in eval mode.
        tokenizer: gives, beside the model, what ends an answer, and the padding, which is masked.
        prompts: n token lists, each of at least one token.
        max_new_tokens: room for an answer, its stop token included.
        temperature: divides the logits.
        top_k: keep the k most likely tokens only; 0 keeps all.
        top_p: keep the smallest set of tokens with this much probability; 1.0 keeps all.
        batch_size: prompts in one batch. Other batches draw other random numbers, so it changes the samples.
        seed: sets torch's global random state.
        desc: what the progress bar says.

    Returns:
        `Answers` in the order of the prompts.
    """
    stops = get_stop_token_ids(model, tokenizer)
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=pad,
    )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    ids: list[list[int]] = [[]] * len(prompts)
    ended = [False] * len(prompts)
    torch.manual_seed(seed)
    # transformers fills what a GenerationConfig leaves out from the checkpoint's own (Qwen2's repetition_penalty 1.1,
    # an instruct model's min_p …), and then the samples are not the policy's: put that one away while sampling.
    checkpoint_config, model.generation_config = model.generation_config, config
    # `generate` drops a mask that hides nothing, and the model then warns that it has none.
    (logger := logging.get_logger("transformers.modeling_utils")).setLevel(logging.ERROR)
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=desc, leave=False, disable=None):
            rows = order[start : start + batch_size]
            width = len(prompts[rows[0]])
            input_ids = torch.full((len(rows), width), pad)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(rows):
                input_ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                attention_mask[row, width - len(prompts[i]) :] = 1
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
            )
            for i, row in zip(rows, output[:, width:].tolist(), strict=True):
                ids[i], ended[i] = cut_answer(row, stops)
    finally:
        model.generation_config = checkpoint_config
        logger.setLevel(logging.NOTSET)  # its own level from before; `from_pretrained` says odd things at another
    return Answers(ids, ended)
