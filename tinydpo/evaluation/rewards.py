"""Rewards that score answers: functions in TRL's form, or a reward model.

    --reward_funcs my_rewards.politeness        --reward_model_name_or_path <sequence-classification model>

Both get what TRL's `GRPOTrainer` gives: lists of messages where the data are conversations, texts where they are
texts. A reward model reads messages in its own chat template, not the policy's.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from tinydpo.data.fitting import decode_completions
from tinydpo.data.pairs import FittedSplit
from tinydpo.data.text import Prompt, format_dialogue, get_prompts
from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.sampling import cut_prompt
from tinydpo.models.loading import load_pretrained, load_tokenizer
from tinydpo.models.precision import set_compute_dtype
from tinydpo.models.stop_tokens import strip_turn_end

RewardFunction = Callable[..., list[float]]


def load_rewards(
    args: RewardArguments, device: str, batch_size: int, dtype: Any = None, required: bool = False
) -> list[RewardFunction]:
    """All rewards as functions, a reward model last; `device`, `batch_size` and `dtype` are the model's."""
    if required and not args.names():
        raise UserError("a reward is needed: pass --reward_funcs or --reward_model_name_or_path")
    functions = [load_reward(name) for name in args.reward_funcs or []]
    if args.reward_model_name_or_path:
        name = args.reward_model_name_or_path
        functions.append(RewardModel(name, args.reward_model_revision, device, batch_size, dtype))
    return functions


def load_reward(name: str) -> RewardFunction:
    """The function named `module.function`; the module may be in the working directory."""
    module, _, function = name.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"--reward_funcs {name!r} (module.function) cannot be imported: {error!r}") from None


class RewardModel:
    """A sequence-classification model, called like a reward function."""

    def __init__(self, name: str, revision: str | None, device: str, batch_size: int, dtype: Any = None):
        """Load it; its blocks compute in `dtype` if its head is one linear layer, else in float32."""
        tokenizer = load_tokenizer(name, revision)
        model = load_pretrained(AutoModelForSequenceClassification, name, revision).to(device=device)
        if model.config.num_labels != 1:
            raise UserError(f"--reward_model_name_or_path {name} has {model.config.num_labels} outputs; it needs one")
        if dtype and isinstance(getattr(model, "score", None), torch.nn.Linear):
            set_compute_dtype(model, dtype)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.truncation_side = "left"  # the answer is at the end
        tokenizer.padding_side = "right"  # GPT-2 would count padding on the left as positions
        model.config.pad_token_id = tokenizer.pad_token_id  # the model finds each text's last token by it
        # scripts/reward.py writes how long its texts were; they stop before the token that ends an answer.
        self.fitted_to = getattr(model.config, "fitted_to", None)
        positions = getattr(model.config, "max_position_embeddings", None) or 4096
        self.max_length = self.fitted_to or min(tokenizer.model_max_length, positions)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Prompt], **kwargs: object) -> list[float]:
        """Score prompt + completion as one text."""
        encoded = [self.encode(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
        longest_first = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        scores: dict[int, float] = {}
        for start in tqdm(range(0, len(encoded), self.batch_size), desc="rewards", leave=False, disable=None):
            rows = longest_first[start : start + self.batch_size]
            inputs = self.tokenizer.pad([encoded[i] for i in rows], return_tensors="pt").to(self.model.device)
            scores.update(zip(rows, self.model(**inputs).logits[:, 0].tolist(), strict=True))
        return [scores[i] for i in range(len(encoded))]

    def encode(self, whole: Prompt) -> dict[str, list[int]]:
        """Tokens of a text, or of a conversation in the model's own chat template (without one, in HH's form)."""
        tokenizer = self.tokenizer
        if not isinstance(whole, str) and tokenizer.chat_template is None:
            whole = format_dialogue(whole)
        if isinstance(whole, str):
            return dict(tokenizer(whole, truncation=True, max_length=self.max_length))
        text = tokenizer.apply_chat_template(whole, tokenize=False)  # writes a begin token itself
        if self.fitted_to:
            text = strip_turn_end(tokenizer, text)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return {"input_ids": cut_prompt(ids, self.max_length, tokenizer.bos_token_id)}


def score_pairs(model: RewardFunction, held_out: FittedSplit, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """A reward model's scores (n,) of fitted pairs' chosen and rejected answers, cut as fitting cut them."""
    ids = {part: held_out.pairs[f"{part}_ids"][:] for part in ("prompt", "chosen", "rejected")}
    cut_prompts = tokenizer.batch_decode(ids["prompt"], skip_special_tokens=True)
    whole = get_prompts(held_out.texts)  # conversations stay whole, for the model's own template
    prompts = [text if isinstance(one, str) else one for one, text in zip(whole, cut_prompts, strict=True)]
    templated = held_out.texts["templated"][:]
    cut = {part: decode_completions(ids[part], templated, tokenizer) for part in ("chosen", "rejected")}
    (chosen,) = score_answers([model], held_out.texts, cut["chosen"], ids["chosen"], prompts)
    (rejected,) = score_answers([model], held_out.texts, cut["rejected"], ids["rejected"], prompts)
    return chosen, rejected


def score_answers(
    functions: Sequence[RewardFunction],
    texts: Dataset,
    answers: Sequence[str],
    ids: Sequence[Sequence[int]],
    prompts: list[Prompt] | None = None,
) -> np.ndarray:
    """The rewards (functions, n) of an answer to each row of `texts` (`FittedSplit.texts`).

    `ids` are the answers' tokens; `prompts` are by default the rows' own, whole. A function that fails, or does not
    return one finite number for each answer, is a UserError.
    """
    prompts = prompts or get_prompts(texts)
    completions = [*map(as_completion, prompts, answers, texts["templated"][:])]
    scores = []
    for function in functions:
        name = f"{function.__module__}.{getattr(function, '__name__', type(function).__name__)}"
        try:
            rewards = function(prompts=prompts, completions=completions, completion_ids=list(ids))
            values = np.asarray(rewards, dtype=np.float64)
        except Exception as error:
            raise UserError(f"reward function {name} failed: {error!r}") from None
        count = len(completions)
        if values.shape != (count,) or not np.isfinite(values).all():
            raise UserError(f"reward function {name} must return {count} finite numbers, one for each completion")
        scores.append(values)
    return np.stack(scores)


def as_completion(prompt: Prompt, answer: str, templated: bool) -> Prompt:
    """An answer in the form of its prompt: a message after messages, else the text."""
    if isinstance(prompt, str):
        return answer
    content = answer if templated else answer.removeprefix(" ")  # without a chat template, HH's form has the space
    return [{"role": "assistant", "content": content}]
