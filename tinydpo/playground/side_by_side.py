"""Policy and reference in memory together: both answer a prompt, and every token has its implicit reward at once.

The two answers grow token by token as two rows of one batch. Both models read both rows, so a token's log-prob under
policy and reference is there when the token is sampled: nothing is scored afterwards.
"""

import inspect
import json
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
from transformers.modeling_outputs import CausalLMOutputWithPast

from tinydpo.config.arguments import DataArguments
from tinydpo.data.fitting import decode_completions, fit_pairs, get_bos_ids, tokenize_prompts
from tinydpo.data.pairs import load_split
from tinydpo.data.rows import BrokenRow, read_row
from tinydpo.data.text import (
    TEXT_FEATURES,
    Prompt,
    format_dialogue,
    format_prompt,
    get_prompts,
    render_row,
    typed_to_dialogue,
    typed_to_messages,
)
from tinydpo.errors import UserError
from tinydpo.evaluation.sampling import choose_prompts, cut_prompt
from tinydpo.models.stop_tokens import get_stop_token_ids
from tinydpo.training.logps import token_logps

# What models call their keys and values of earlier tokens: `past_key_values` before transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"


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

    `beta` scales rewards; prompt and answer are fitted to `max_length` and `max_question_length` as in training.
    `chat` says whether prompts are messages for the chat template. None: they are if there is one.
    """

    policy: PreTrainedModel
    ref: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    beta: float
    max_length: int
    max_question_length: int
    chat: bool | None = None

    def __post_init__(self):
        self.chat = self.tokenizer.chat_template is not None and self.chat is not False

    def decode_answer(self, answer: Answer) -> str:
        """The answer's text as in a data set, without stop token."""
        ids = answer.ids[:-1] if answer.ended else answer.ids
        return decode_completions([ids], [self.chat], self.tokenizer)[0]

    def choose_examples(self, data: DataArguments, seed: int) -> list[str]:
        """Five held-out prompts as one would type them, single questions first; none if the data cannot be read."""
        try:
            texts = load_split(data, self.tokenizer, self.max_length, "test").texts
        except UserError:  # the models answer without their data
            return []
        prompts = get_prompts(choose_prompts(texts, 50, seed))
        dialogues = sorted((typed_to_messages(format_prompt(prompt)) for prompt in prompts), key=len)[:5]
        return [each[0]["content"] if len(each) == 1 else format_dialogue(each, "").strip() for each in dialogues]

    def make_prompt(self, typed: str) -> Prompt:
        """What was typed, plain text or a dialogue in HH's form, as in training rows: messages or a text."""
        return typed_to_messages(typed) if self.chat else typed_to_dialogue(typed)

    def fit_prompt(self, prompt: Prompt, max_new_tokens: int) -> tuple[list[int], bool]:
        """A prompt's tokens, cut at its start to leave room for `max_new_tokens`, and whether anything was cut."""
        row = self._render(make_pair(prompt, "A", "B"))  # the answers do not matter
        batch = {name: [row[name]] for name in ("prompt", "question", "templated")}
        ids = tokenize_prompts(batch, self.tokenizer)[0][0]
        bos_token_id = next(iter(get_bos_ids(self.tokenizer)), None)
        fitted = cut_prompt(ids, self.max_length - max_new_tokens, bos_token_id)
        return fitted, len(fitted) < len(ids)

    @torch.no_grad()
    def stream_answers(
        self, prompt: list[int], max_new_tokens: int, *, temperature: float, top_k: int, top_p: float, seed: int
    ) -> Iterator[tuple[Answer, Answer]]:
        """Sample the reference's and the policy's answer independently, and yield both after every token.

        Temperature 0 takes the likeliest token; `top_k` 0 and `top_p` 1 keep all. Rewards are of the models' own
        distributions, whatever the sampling settings.
        """
        models = (self.ref, self.policy)
        answers = (Answer(), Answer())
        stops = [get_stop_token_ids(model, self.tokenizer) for model in models]
        caches = [None, None]
        warpers = LogitsProcessorList()  # nothing that a checkpoint's generation config adds
        if temperature == 0:
            top_k = 1
        else:
            warpers.append(TemperatureLogitsWarper(float(temperature)))  # a page's 1.0 comes as 1
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        generator = torch.Generator(self.policy.device).manual_seed(seed)
        ids = torch.tensor([prompt, prompt], device=self.policy.device)  # row 0 is the reference's, row 1 the policy's
        mask = torch.ones_like(ids)
        for _ in range(max_new_tokens):
            logits = []
            for i, model in enumerate(models):
                out = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE: caches[i]})
                caches[i] = out[CACHE]
                logits.append(out.logits[:, -1].float())
            own_logits = torch.stack([logits[0][0], logits[1][1]])
            ids = torch.multinomial(warpers(None, own_logits).softmax(-1), 1, generator=generator)
            ref_logps, policy_logps = (each.log_softmax(-1).gather(1, ids).flatten() for each in logits)
            rewards = self.beta * (policy_logps - ref_logps)
            for i, answer in enumerate(answers):
                if not answer.ended:
                    answer.ids.append(ids[i].item())
                    answer.rewards.append(rewards[i].item())
                    answer.ended = answer.ids[-1] in stops[i]
            yield answers
            if all(answer.ended for answer in answers):
                return
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)

    def compare_pair(self, typed: str, first: str, second: str) -> tuple[Answer, Answer, bool]:
        """A typed prompt's two answers with their rewards, fitted as in training, and whether anything was cut."""
        if not (typed.strip() and first.strip() and second.strip()):
            raise UserError("type a prompt and two answers")
        prompt = self.make_prompt(typed)
        space = "" if self.chat else " "  # as after "Assistant:"
        row = self._render(make_pair(prompt, space + first.strip(), space + second.strip()))
        texts = Dataset.from_list([dict.fromkeys(TEXT_FEATURES) | row], features=TEXT_FEATURES)
        pair = fit_pairs(texts, self.tokenizer, self.max_length, self.max_question_length, workers=1)[0]
        if pair["dropped"]:
            raise UserError(f"nothing to compare within {self.max_length} tokens: {pair['dropped']}")
        answers = [self._score(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids")]
        is_whole = len(pair["prompt_ids"]) == pair["prompt_tokens"] and all(answer.ended for answer in answers)
        return *answers, not is_whole

    def _score(self, prompt: list[int], ids: list[int]) -> Answer:
        log_ratios = token_logps(self.policy, [prompt], [ids])[0] - token_logps(self.ref, [prompt], [ids])[0]
        ended = ids[-1] in get_stop_token_ids(self.policy, self.tokenizer)
        return Answer(ids, (self.beta * log_ratios).tolist(), ended)

    def _render(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return render_row(read_row(row), self.tokenizer, need_pairs=True)
        except BrokenRow as error:
            raise UserError(f"this cannot be read: {error}") from None


def make_pair(prompt: Prompt, chosen: str, rejected: str) -> dict[str, Any]:
    """A row to train on; answers have the form of their prompt, messages or texts."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    chosen_messages = [{"role": "assistant", "content": chosen}]
    rejected_messages = [{"role": "assistant", "content": rejected}]
    return {"prompt": prompt, "chosen": chosen_messages, "rejected": rejected_messages}


def save_vote(path: Path, prompt: Prompt, chosen: str, rejected: str) -> None:
    """Append a pair that `--dataset_name` reads (UserError: it prefers nothing)."""
    if not (chosen.strip() and rejected.strip()) or chosen == rejected:
        raise UserError("the answers are the same, or one is empty; generate again")
    row = make_pair(prompt, chosen, rejected) | {"voted_at": datetime.now(UTC).isoformat()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
