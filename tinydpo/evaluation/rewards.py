"""The rewards that answers are judged by: functions in TRL's form, or a reward model.

Both get what TRL's `GRPOTrainer` gives: lists of messages where the data hold conversations, texts where they hold
texts. A reward model reads messages in its own chat template, never in the policy's.

--reward_funcs my_rewards.politeness        --reward_model_name_or_path <sequence-classification model>
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from tinydpo.data.text import Prompt, format_dialogue, get_prompts
from tinydpo.errors import UserError
from tinydpo.evaluation.sampling import cut_prompt
from tinydpo.models.loading import load_pretrained, load_tokenizer
from tinydpo.models.precision import set_compute_dtype
from tinydpo.models.stop_tokens import strip_turn_end

RewardFunction = Callable[..., list[float]]


@dataclass
class RewardArguments:
    """Rewards that add up to one."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Rewards as module.function, in TRL's form f(prompts, completions, **kwargs); summed."},
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A sequence-classification model of one output that scores prompt + answer, a conversation in its "
            "own chat template: folder or Hub id."
        },
    )
    reward_model_revision: str | None = field(
        default=None, metadata={"help": "Commit, tag or branch of a reward model on the Hub."}
    )

    def names(self) -> list[str]:
        """What each reward is called: a function by its name, a model by the last part of its own."""
        given = [*(self.reward_funcs or []), self.reward_model_name_or_path or ""]
        return [name.rsplit(".", 1)[-1].rsplit("/", 1)[-1] for name in given if name]

    def name(self) -> str:
        """The rewards as an axis is labelled with their sum."""
        return " + ".join(self.names())


def load_rewards(args: RewardArguments, device: str, batch_size: int, dtype: Any = None) -> list[RewardFunction]:
    """Every reward asked for, as a function; `device`, `batch_size` and `dtype` are a reward model's.

    Raises:
        UserError: one of them cannot be loaded.
    """
    functions = [load_reward(name) for name in args.reward_funcs or []]
    if args.reward_model_name_or_path:
        model = args.reward_model_name_or_path, args.reward_model_revision
        functions.append(load_reward_model(*model, device, batch_size, dtype))
    return functions


def load_reward_model(
    name: str, revision: str | None, device: str, batch_size: int, dtype: Any = None
) -> RewardFunction:
    """A function that gives prompt + completion, as one text, to a sequence-classification model.

    A conversation is written by the model's own chat template, begin token included, or in HH's form without one.

    Args:
        name: folder or Hub id.
        revision: commit, tag or branch on the Hub.
        device: torch device.
        batch_size: texts in one forward pass.
        dtype: torch dtype that its blocks compute in, float32 by default and where its head is not one linear layer.

    Raises:
        UserError: it cannot be loaded, or is no reward model: another number of outputs than one, or no trained head.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(name, revision)
    model, loading = load_pretrained(AutoModelForSequenceClassification, name, revision, device=device)
    if loading["missing_keys"] or model.config.num_labels != 1:
        lacks = "has no trained head" if loading["missing_keys"] else f"has {model.config.num_labels} outputs"
        raise UserError(f"--reward_model_name_or_path {name} {lacks}; pass a model trained to give one reward")
    if dtype and isinstance(getattr(model, "score", None), torch.nn.Linear):
        set_compute_dtype(model, dtype)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.truncation_side = "left"  # the answer stands at the end
    tokenizer.padding_side = "right"  # GPT-2's positions count padding on the left
    model.config.pad_token_id = tokenizer.pad_token_id  # by it the model finds each text's last token
    # One of scripts/reward.py says so itself: it knows no longer texts, and none that go on behind an answer's end.
    fitted_to, positions = (getattr(model.config, name, None) for name in ("fitted_to", "max_position_embeddings"))
    longest = fitted_to or min(tokenizer.model_max_length, positions or 4096)

    def encode(prompt: Prompt, completion: Prompt) -> dict[str, list[int]]:
        whole = prompt + completion
        if isinstance(whole, str) or tokenizer.chat_template is None:
            text = whole if isinstance(whole, str) else format_dialogue(whole)
            return dict(tokenizer(text, truncation=True, max_length=longest))
        text = tokenizer.apply_chat_template(whole, tokenize=False)  # with the begin token, where there is one
        text = strip_turn_end(tokenizer, text) if fitted_to else text
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return {"input_ids": cut_prompt(ids, longest, tokenizer.bos_token_id)}

    @torch.no_grad()
    def reward_model(prompts: list[Prompt], completions: list[Prompt], **kwargs: object) -> list[float]:
        encoded = [encode(*both) for both in zip(prompts, completions, strict=True)]
        # Texts alike in length lie in one batch: less padding.
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        scores: dict[int, float] = {}
        for start in tqdm(range(0, len(order), batch_size), desc="rewards", leave=False, disable=None):
            batch = order[start : start + batch_size]
            inputs = tokenizer.pad([encoded[i] for i in batch], return_tensors="pt")
            scores |= zip(batch, model(**inputs.to(model.device)).logits[:, 0].tolist(), strict=True)
        return [scores[i] for i in range(len(encoded))]

    return reward_model


def load_reward(name: str) -> RewardFunction:
    """The function that `module.function` names; the module may lie in the working directory.

    Raises:
        UserError: no such module or function, or the module fails to import.
    """
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(f"--reward_funcs {name!r} is not of the form module.function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        reward = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UserError(f"--reward_funcs {name!r}: cannot import {module!r}: {error!r}") from None
    if not callable(reward):
        raise UserError(f"--reward_funcs {name!r}: module {module!r} has no function {function!r}")
    return reward


def score_by_function(functions: Sequence[RewardFunction], *answers: Any) -> np.ndarray:
    """`scores_of` answers by each function alone, (functions, n)."""
    return np.stack([score_answers([function], *answers) for function in functions])


def score_answers(
    functions: Sequence[RewardFunction],
    texts: Dataset,
    written: Sequence[str],
    ids: Sequence[Sequence[int]],
    prompts: list[Prompt] | None = None,
) -> np.ndarray:
    """`rewards` of answers to rows with the columns of `dialogues.TEXTS`.

    Args:
        functions: which.
        texts: n rows.
        written: an answer to each, in words.
        ids: its tokens.
        prompts: what was answered, by default the rows' own prompts, whole.
    """
    prompts, templated = prompts or get_prompts(texts), texts["templated"][:]

    completions = [*map(as_completion, prompts, written, templated)]
    return sum_rewards(functions, prompts, completions, completion_ids=list(ids))


def as_completion(prompt: Prompt, said: str, templated: bool) -> Prompt:
    """An answer as the data have it: a message after messages, else a text.

    Args:
        prompt: what was answered.
        said: the answer in words, as the model wrote them after the prompt.
        templated: whether a chat template wrote that. HH's form has a space before an answer's words, which are the
            message.
    """
    content = said if templated else said.removeprefix(" ")
    return said if isinstance(prompt, str) else [{"role": "assistant", "content": content}]


def sum_rewards(
    functions: Sequence[RewardFunction], prompts: list[Prompt], completions: list[Prompt], **columns: list[Any]
) -> np.ndarray:
    """Sum of the functions' rewards for each completion, (n,) float64; `columns` are passed on to each function.

    Raises:
        UserError: a function raises, or gives anything but one finite number a completion.
    """
    total = np.zeros(len(completions))
    for function in functions:
        name = f"{function.__module__}.{getattr(function, '__name__', function)}"
        try:
            values = np.asarray(function(prompts=prompts, completions=completions, **columns), dtype=np.float64)
        except Exception as error:
            raise UserError(f"reward function {name} failed: {error!r}") from None
        if values.shape != total.shape or not np.isfinite(values).all():
            raise UserError(
                f"reward function {name} must return {len(completions)} finite numbers, one for each completion, "
                f"but returned shape {values.shape}"
            )
        total += values
    return total
