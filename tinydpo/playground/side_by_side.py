"""Policy and reference in memory together: both answer a prompt, and every token has its implicit reward at once.

Models are asked as they were trained: through their chat template, or in HH's form, which a model with a template may
have been trained on too.

The two answers grow token by token as two rows of one batch. Both models read both rows, so that what a token's reward
needs, its log-prob under policy and reference, is there when the token is drawn: nothing is scored afterwards.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tinydpo.data.fitting import fit_pairs, get_bos_ids, tokenize_prompts
from tinydpo.data.pairs import hide_progress_bars
from tinydpo.data.rows import BrokenRow, read_row
from tinydpo.data.text import TEXT_FEATURES, Prompt, render_row, typed_to_dialogue, typed_to_messages
from tinydpo.errors import UserError
from tinydpo.evaluation.sampling import cut_prompt
from tinydpo.models.stop_tokens import get_stop_token_ids
from tinydpo.training.logps import token_logps


@dataclass
class Answer:
    """An answer's n tokens (`ids`), the implicit reward β log π/π_ref of each, and whether a stop token ends it."""

    ids: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def reward(self) -> float:
        """The whole answer's implicit reward, without the part that all answers to a prompt share."""
        return sum(self.rewards)


@dataclass
class SideBySide:
    """A policy and its reference, causal LMs in eval mode on one device, with the tokenizer of both.

    `beta` scales rewards; prompt and answer together have `max_length` tokens, of which a long prompt's last question
    is sure of `max_question_length`, as in training. `turns` says whether prompts are conversations for the chat
    template; where nobody knows (None), they are if there is one.
    """

    policy: PreTrainedModel
    ref: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    beta: float
    max_length: int
    max_question_length: int
    turns: bool | None = None

    def __post_init__(self):
        """Without a template there is only HH's form."""
        templated = self.tokenizer.chat_template is not None
        self.turns = templated if self.turns is None else self.turns and templated

    def text(self, answer: Answer) -> str:
        """The answer as a data set would hold it, without stop token."""
        ids = answer.ids[: len(answer.ids) - answer.ended]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, typed: str) -> Prompt:
        """What was typed, plain or a dialogue in HH's form, as rows to train on hold it: messages or a text."""
        return typed_to_messages(typed) if self.turns else typed_to_dialogue(typed)

    def fit_prompt(self, prompt: Prompt, max_new_tokens: int) -> tuple[list[int], bool]:
        """A whole prompt's tokens, cut at its start to what `max_new_tokens` leaves, and whether anything was cut.

        Raises:
            UserError: the model's chat template cannot write it.
        """
        row = {"prompt": prompt, "templated": False, "question": 0}
        if not isinstance(prompt, str):
            row |= self._read({"prompt": prompt, "completion": as_answer(prompt, "…")}, need_pairs=False)
        (ids,), _ = tokenize_prompts({name: [value] for name, value in row.items()}, self.tokenizer)
        fitted = cut_prompt(ids, self.max_length - max_new_tokens, next(iter(get_bos_ids(self.tokenizer)), None))
        return fitted, len(fitted) < len(ids)

    @torch.no_grad()
    def stream(
        self, prompt: list[int], max_new_tokens: int, *, temperature: float, top_k: int, top_p: float, seed: int
    ) -> Iterator[tuple[Answer, Answer]]:
        """Sample the reference's and the policy's answer, independently of each other.

        Args:
            prompt: at least one token.
            max_new_tokens: room for an answer, its stop token included.
            temperature: divides the logits, above 0.
            top_k: keep the k most likely tokens only; 0 keeps all.
            top_p: keep the smallest set of tokens with this much probability; 1.0 keeps all.
            seed: the same seed gives the same answers.

        Yields:
            Reference's and policy's answer so far (the same two objects), after every token. The rewards are of the
            models' own distributions, whatever the sampling makes of them.
        """
        # A list of its own: `generate` would take what a checkpoint's generation config adds.
        reshape = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            reshape.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            reshape.append(TopPLogitsWarper(top_p))
        fed = torch.tensor([prompt] * 2, device=self.policy.device)
        seen = torch.ones_like(fed)
        drawing = torch.Generator(self.policy.device).manual_seed(seed)
        answers, caches = (Answer(), Answer()), [None, None]
        stops = [get_stop_token_ids(model, self.tokenizer) for model in (self.ref, self.policy)]
        for _ in range(max_new_tokens):
            logits = []
            for i, model in enumerate((self.ref, self.policy)):
                out = model(fed, attention_mask=seen, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
                caches[i] = out.past_key_values
                logits.append(out.logits[:, -1].float())
            own = torch.stack([logits[0][0], logits[1][1]])  # row 0 is the reference's answer, row 1 the policy's
            fed = torch.multinomial(reshape(None, own).softmax(-1), 1, generator=drawing)
            ref, policy = (model.log_softmax(-1).gather(1, fed).flatten() for model in logits)
            for answer, ends, token, reward in zip(answers, stops, fed.flatten().tolist(), policy - ref, strict=True):
                if not answer.ended:
                    answer.ids.append(token)
                    answer.rewards.append(self.beta * reward.item())
                    answer.ended = token in ends
            yield answers
            if all(answer.ended for answer in answers):
                return
            seen = torch.cat([seen, torch.ones_like(fed)], dim=1)

    def compare(self, prompt: str, first: str, second: str) -> tuple[Answer, Answer, bool]:
        """Both models' view of a pair, fitted to the token budget as training does.

        Args:
            prompt: plain text, or a dialogue in HH's form.
            first: an answer to it.
            second: another one.

        Returns:
            The two answers with their rewards, and whether anything had to be cut.

        Raises:
            UserError: something is empty, or the answers are the same within the budget.
        """
        for name, text in (("prompt", prompt), ("answer A", first), ("answer B", second)):
            if not text.strip():
                raise UserError(f"the {name} is empty; a pair is a prompt and two answers")
        asked, space = self.prompt(prompt), " " * (not self.turns)  # as after "Assistant:"
        chosen, rejected = (as_answer(asked, space + text.strip()) for text in (first, second))
        pair = self._read({"prompt": asked, "chosen": chosen, "rejected": rejected}, need_pairs=True)
        with hide_progress_bars(small=True):
            texts = Dataset.from_list([dict.fromkeys(TEXT_FEATURES) | pair], features=TEXT_FEATURES)
            fitted = fit_pairs(texts, self.tokenizer, self.max_length, self.max_question_length, workers=1)[0]
        if fitted["dropped"]:
            raise UserError(f"nothing to compare within {self.max_length} tokens: {fitted['dropped']}")
        prompts, both = [fitted["prompt_ids"]] * 2, [fitted["chosen_ids"], fitted["rejected_ids"]]
        scored = zip(*(token_logps(model, prompts, both) for model in (self.policy, self.ref)), strict=True)
        answers = [
            Answer(
                ids, (self.beta * (policy - ref)).tolist(), ids[-1] in get_stop_token_ids(self.policy, self.tokenizer)
            )
            for ids, (policy, ref) in zip(both, scored, strict=True)
        ]
        whole = len(prompts[0]) == fitted["prompt_tokens"] and all(answer.ended for answer in answers)
        return *answers, not whole

    def _read(self, row: dict[str, Any], need_pairs: bool) -> dict[str, Any]:
        try:
            return render_row(read_row(row), self.tokenizer, need_pairs)
        except BrokenRow as error:
            raise UserError(f"this cannot be read: {error}") from None


def as_answer(prompt: Prompt, text: str) -> Prompt:
    """An answer in the form of its prompt: messages to messages, text to text."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def count_votes(path: Path) -> int:
    """How many votes the file holds; 0 where there is none."""
    return sum(bool(line.strip()) for line in path.read_bytes().splitlines()) if path.is_file() else 0


def save_vote(path: Path, prompt: Prompt, chosen: str, rejected: str) -> int:
    """Append a preference that `--dataset_name` reads, in the form of its prompt, and count.

    Raises:
        UserError: the answers cannot be told apart, or the file cannot be written.
    """
    if not (chosen.strip() and rejected.strip()):
        raise UserError("an empty answer cannot be voted on; generate again")
    if chosen == rejected:
        raise UserError("the two answers are the same, so there is nothing to prefer; generate again")
    row = {"prompt": prompt, "chosen": as_answer(prompt, chosen), "rejected": as_answer(prompt, rejected)}
    row["voted_at"] = datetime.now(UTC).isoformat()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as stream:
            # A line cut by a full disk, or by an editor that ends files without a newline, stays a line of its own.
            torn = stream.tell() and stream.seek(-1, os.SEEK_END) >= 0 and stream.read(1) != b"\n"
            stream.write(b"\n" * bool(torn) + json.dumps(row, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"the vote could not be written to {path}: {error.strerror}") from None
    return count_votes(path)
