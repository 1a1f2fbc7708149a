"""A judge: any endpoint of OpenAI's chat protocol, asked which of two answers is more helpful.

The question follows the helpfulness prompt of the DPO paper (arXiv 2305.18290, appendix), in our own words. Every pair
is asked in both orders, and every verdict is saved as soon as it arrives, so that nothing is paid for twice. The judge
itself is tested first, on held-out pairs whose labels are known.
"""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from tinydpo.data.text import get_readable_columns
from tinydpo.errors import UserError, print_stderr
from tinydpo.evaluation.arguments import check_given, check_positive
from tinydpo.evaluation.metrics import wilson_interval
from tinydpo.evaluation.sampling import choose_prompts
from tinydpo.evaluation.winrate import get_outcome

try:
    import openai
except ImportError:  # an extra
    openai = None

QUESTION = """\
Below are a conversation and two replies to its last turn. Which reply helps the person more? Weigh what is said, not \
how long it is, nor which reply stands first. Either may stop in mid-sentence because its length was limited: judge \
what is there.

[conversation]
{prompt}
[end of conversation]

[reply A]
{a}
[end of reply A]

[reply B]
{b}
[end of reply B]

Answer in two lines:
Comparison: <one sentence on which reply helps more, and why>
More helpful: <A, B or tie>"""
# The verdict is the last line, or its end after "More helpful:", because small models put a sentence before it. The
# smallest ones repeat the question's marker "[reply B]", which is not a verdict.
VERDICT = re.compile(
    r"(?:\A(?!\[reply)\W*(?:(?i:more helpful)\W+)?|\bMore [Hh]elpful[^\w:]*:\W*)(?i:reply\W+)?(A|B|(?i:tie))\W*\Z"
)
CONSISTENT_VERDICTS = {("A", "B"), ("B", "A"), ("tie", "tie")}  # the same whichever answer comes first
CACHED = {"key", "verdict", "prompt_tokens", "completion_tokens"}  # what is used of a saved verdict
MAX_TOKENS = 200  # enough for a sentence and the verdict
MAX_REASONING_TOKENS = 4000  # enough with the thoughts of a reasoning model, which count too
# What some models refuse, and what they are asked with then.
FALLBACKS: dict[str, dict[str, int]] = {
    "temperature": {},
    "max_tokens": {"max_completion_tokens": MAX_REASONING_TOKENS},
}
RETRIES = 5  # the client's own: of 429, 5xx, time-outs and lost connections, with growing pauses


@dataclass
class JudgeArguments:
    """Which judge to ask. Its key comes from the environment only: JUDGE_API_KEY, else OPENAI_API_KEY."""

    judge_base_url: str | None = HfArg(default=None, help="An endpoint of OpenAI's protocol, such as https://host/v1.")
    judge_model: str | None = HfArg(default=None, help="The judge's name at that endpoint.")
    judge_concurrency: int = HfArg(default=8, help="Questions sent at once: 1 for a server that takes one at a time.")
    judge_timeout: float = HfArg(default=120.0, help="Seconds to wait without receiving anything.")

    def __post_init__(self):
        check_given(self, "judge_base_url", "judge_model", hint="a win rate needs a judge (docs/evaluation.md)")
        check_positive(self, "judge_concurrency")
        if {"@", "?", "#"} & set(self.judge_base_url):  # addresses are stored, and these may contain a secret
            raise ValueError("judge_base_url must not contain a user, password or query; set the key as JUDGE_API_KEY")


def read_verdict(reply: str) -> str:
    """The verdict in the last line of a reply: "A", "B" or "tie"; of anything else, a refusal too, "invalid"."""
    match = VERDICT.search(reply.strip().rpartition("\n")[2])
    if match is None:
        return "invalid"
    return match[1] if match[1] in "AB" else "tie"


class Judge:
    """A judge and its verdicts so far, saved as JSON lines in `cache_file`."""

    def __init__(self, args: JudgeArguments, cache_file: Path):
        if openai is None:
            raise UserError("the judge's client is missing; run `make winrate`, or pip install '.[judge]'")
        self.args = args
        self.cache_file = cache_file
        self._key = (os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # the client's error would print it
            raise UserError("the judge's key in the environment has characters that no key has; set it again")
        self._rows = self._read_cache()
        self._used: set[str] = set()  # keys of the verdicts used in this run
        self._asked = 0
        self._options: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}

    def compare(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], desc: str
    ) -> list[tuple[str, str]]:
        """The verdicts on n pairs of answers, with the first one as A, then as B; equal answers tie without asking."""
        pairs = [(a.strip(), b.strip()) for a, b in zip(first, second, strict=True)]
        questions = []
        for prompt, (a, b) in zip(prompts, pairs, strict=True):
            if a != b:
                questions.append(QUESTION.format(prompt=prompt.strip(), a=a, b=b))
                questions.append(QUESTION.format(prompt=prompt.strip(), a=b, b=a))
        answers = iter(self._ask(questions, desc))
        verdicts = [("tie", "tie") if a == b else (next(answers), next(answers)) for a, b in pairs]
        if all(get_outcome(*pair) is None for pair in verdicts):
            what = f"none of {self.args.judge_model}'s verdicts ({desc}) can be read"
            raise UserError(f"{what}; its replies are in {self.cache_file}, try a different --judge_model")
        return verdicts

    def count_tokens(self) -> dict[str, int]:
        """Tokens spent on the verdicts used, and how many of these were asked for now and how many were cached."""
        rows = [self._rows[key] for key in self._used]

        def count(kind: str) -> int:
            return sum(row[kind] for row in rows if isinstance(row[kind], int))  # servers may not count, or send text

        return {
            "prompt": count("prompt_tokens"),
            "completion": count("completion_tokens"),
            "verdicts_asked": self._asked,
            "verdicts_cached": len(rows) - self._asked,
        }

    def _ask(self, questions: Sequence[str], desc: str) -> list[str]:
        """The verdict on each question; only new questions are sent."""
        keys = [self._get_key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._rows}
        try:
            asyncio.run(self._ask_all(new, desc))
        except (openai.OpenAIError, UserError) as error:
            reason = self._hide_key(self._describe_error(error))[:300]
            raise UserError(
                f"the judge at {self.args.judge_base_url} {reason}; {len(self._rows)} verdicts are saved in "
                f"{self.cache_file}, run the same command again to continue"
            ) from None
        self._used.update(keys)
        return [self._rows[key]["verdict"] for key in keys]

    async def _ask_all(self, questions: dict[str, str], desc: str) -> None:
        client = openai.AsyncOpenAI(
            base_url=self.args.judge_base_url,
            api_key=self._key or "none",  # a local server needs none, but the client insists on one
            timeout=self.args.judge_timeout,
            max_retries=RETRIES,
        )
        limit = asyncio.Semaphore(self.args.judge_concurrency)
        async with client:
            tasks = [asyncio.create_task(self._ask_one(client, limit, *each)) for each in questions.items()]
            try:
                for task in tqdm(asyncio.as_completed(tasks), desc, len(tasks), leave=False, disable=None):
                    await task
            finally:  # after a failure nothing more is asked, and the failures that followed are not shown
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_one(self, client: Any, limit: asyncio.Semaphore, key: str, question: str) -> None:
        async with limit:
            reply, verdict, usage = await self._get_reply(client, question)
        row = {
            "key": key,
            "verdict": verdict,
            "prompt_tokens": getattr(usage, "prompt_tokens", None),
            "completion_tokens": getattr(usage, "completion_tokens", None),
            "judge": self.args.judge_model,
            "question": question,
            "reply": self._hide_key(reply),
        }
        with self.cache_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._rows[key] = row
        self._asked += 1

    async def _get_reply(self, client: Any, question: str) -> tuple[str, str, Any]:
        """The judge's text, its verdict, and the tokens it took if the endpoint counts them."""
        try:
            completion = await self._create_completion(client, question)
            if completion.choices[0].finish_reason == "length" and "max_tokens" in self._options:
                completion = await self._ask_with_more_room(client, question) or completion
            choice = completion.choices[0]
            reply = str(choice.message.content or choice.message.refusal or "")
            is_cut = choice.finish_reason == "length"  # then whatever comes last is not the verdict
            return reply, "invalid" if is_cut else read_verdict(reply), completion.usage
        except openai.BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):  # the endpoint refuses, not the model
                return "", "invalid", None
            raise
        except (ValueError, AttributeError, IndexError, TypeError):
            raise UserError("does not answer in OpenAI's chat protocol; check --judge_base_url") from None

    async def _create_completion(self, client: Any, question: str) -> Any:
        """Ask with the settings of `FALLBACKS`; one that the judge refuses is replaced from then on."""
        model = self.args.judge_model
        messages = [{"role": "user", "content": question}]
        options = dict(self._options)
        try:
            return await client.chat.completions.create(model=model, messages=messages, **options)
        except openai.BadRequestError as error:
            complaint = f"{error.param} {error.message}"
            refused = next((name for name in FALLBACKS if name in options and name in complaint), None)
            if refused is None:
                raise
            if refused in self._options:  # else another question has met the same refusal
                del self._options[refused]
                self._options |= FALLBACKS[refused]
                print_stderr(
                    f"{model} refuses {refused}; asking with {', '.join(FALLBACKS[refused]) or 'its own'} instead."
                )
        return await self._create_completion(client, question)

    async def _ask_with_more_room(self, client: Any, question: str) -> Any:
        """Ask once more after a reply was cut: maybe it was thoughts. None if the server has no such room or time."""
        options = self._options | {"max_tokens": MAX_REASONING_TOKENS}
        messages = [{"role": "user", "content": question}]
        create = client.with_options(max_retries=0).chat.completions.create
        with suppress(openai.BadRequestError, openai.APITimeoutError):
            return await create(model=self.args.judge_model, messages=messages, **options)

    def _describe_error(self, error: Exception) -> str:
        """What went wrong, as the rest of a sentence that begins with the judge."""
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                return f"refuses the key ({error.status_code}); set JUDGE_API_KEY or OPENAI_API_KEY to one it accepts"
            case openai.NotFoundError():
                return "answers 404; check --judge_model, and --judge_base_url, which usually ends in /v1"
            case openai.APITimeoutError():
                tries = f"within {self.args.judge_timeout:g} s, {RETRIES + 1} times"
                return f"sent no reply {tries}; raise --judge_timeout, or pass --judge_concurrency 1 to a local server"
            case openai.APIStatusError():
                return f"answers {error.status_code}: {error.message}"
            case openai.APIConnectionError():
                return f"cannot be reached ({error.__cause__ or error})"
        return str(error)

    def _get_key(self, question: str) -> str:
        identity = [self.args.judge_base_url, self.args.judge_model, question]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _read_cache(self) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = {}
        text = self.cache_file.read_text() if self.cache_file.exists() else ""
        if text and not text.endswith("\n"):  # a killed run has left its last line half written
            with self.cache_file.open("a") as file:
                file.write("\n")
        for line in text.split("\n"):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and row.keys() >= CACHED:
                    rows[row["key"]] = row
        return rows

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


def calibrate_judge(judge: Judge, texts: Dataset, tokenizer: Any, pairs: int, seed: int) -> dict[str, Any] | None:
    """`measure_agreement` on up to `pairs` held-out pairs, chosen against rejected, uncut; None if `pairs` is 0."""
    if not pairs:
        return None
    rows = get_readable_columns(choose_prompts(texts, pairs, seed), tokenizer, "chosen", "rejected")
    verdicts = judge.compare(rows["prompt"], rows["chosen"], rows["rejected"], "judge: labelled pairs")
    return measure_agreement(verdicts)


def measure_agreement(verdicts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """How well n pairs of verdicts, with the chosen answer as A and as B, agree with the labels.

    `agreement` is the share of valid pairs whose chosen answer the judge prefers (ties half, as in a win rate), and
    `order_flip_rate` the share of those on which the verdict changes with the order.
    """
    valid = [pair for pair in verdicts if "invalid" not in pair]
    outcomes = [get_outcome(*pair) for pair in valid]
    return {
        "pairs": len(verdicts),
        "agreed": outcomes.count(1.0),
        "ties": outcomes.count(0.5),
        "disagreed": outcomes.count(0.0),
        "invalid": len(verdicts) - len(valid),
        "agreement": sum(outcomes) / len(valid),
        "agreement_ci95": list(wilson_interval(sum(outcomes), len(valid))),
        "order_flip_rate": sum(pair not in CONSISTENT_VERDICTS for pair in valid) / len(valid),
    }
