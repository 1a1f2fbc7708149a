"""A judge: any endpoint of OpenAI's chat protocol, asked which of two answers helps more.

The idea is the helpfulness prompt of the DPO paper (arXiv 2305.18290, appendix), in words of our own: the judge
compares in a sentence, then names one. Every pair is asked in both orders, and every verdict is kept on disk.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datasets import Dataset

from tinydpo.data.text import get_readable_columns
from tinydpo.errors import Stopped, UserError
from tinydpo.evaluation.metrics import wilson_interval
from tinydpo.evaluation.sampling import choose_prompts

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
# A line of its own or, as small models write it, the label that was asked for at the end of a sentence's line.
# "[reply B]" is the question's own marker, which the smallest repeat.
VERDICT = re.compile(
    r"(?:\A(?!\[reply)\W*(?:(?i:more helpful)\W+)?|\bMore [Hh]elpful\W*:\W*)(?i:reply\W+)?(A|B|(?i:tie))\W*\Z"
)
MAX_TOKENS = 200  # ample for a sentence and the verdict
RETRIES = 5  # of 429, 5xx, time-outs and lost connections; the client waits longer each time, or as the server asks


@dataclass
class JudgeArguments:
    """Who judges. Its key comes from the environment alone: JUDGE_API_KEY, else OPENAI_API_KEY."""

    judge_base_url: str | None = field(
        default=None, metadata={"help": "An endpoint of OpenAI's protocol, such as http://127.0.0.1:8000/v1."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge's name at that endpoint."})
    judge_concurrency: int = field(
        default=8, metadata={"help": "Most questions under way at once; fewer where replies come late."}
    )
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for one reply."})

    def __post_init__(self):
        """Refuse what cannot be asked, and addresses with a secret in them: they would be stored (ValueError)."""
        for name in ("judge_base_url", "judge_model"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing; a win rate needs a judge, and `transformers serve` can be one")
        url = urlsplit(self.judge_base_url)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query or url.fragment:
            raise ValueError(
                "judge_base_url must look like https://host/v1, without a user, password or query; "
                "set the key in the environment as JUDGE_API_KEY"
            )
        if self.judge_concurrency < 1 or self.judge_timeout <= 0:
            raise ValueError(
                "judge_concurrency must be at least 1 and judge_timeout above 0, "
                f"got {self.judge_concurrency} and {self.judge_timeout}"
            )


def read_verdict(reply: str) -> str:
    """What the reply's last line is, or ends in: "A", "B" or "tie"; all else, a refusal too, is "invalid"."""
    match = VERDICT.search(reply.strip().rpartition("\n")[2])
    if match is None:
        return "invalid"
    return match[1] if match[1] in "AB" else "tie"


def get_outcome(policy_first: str, policy_second: str) -> float | None:
    """What the verdicts on a pair say of the policy's answer, which stood as A, then as B.

    Returns:
        1 (wins in both orders), 0 (loses in both), 0.5 (a tie, or a judge that goes by the order), or None where
        either verdict is invalid.
    """
    if "invalid" in (policy_first, policy_second):
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((policy_first, policy_second), 0.5)


class Judge:
    """An endpoint and the verdicts it has given, kept in `verdicts.jsonl`, a line each as soon as it comes.

    Args:
        args: the endpoint.
        cache: the file of verdicts. A verdict is asked again only if model, address or question differ.

    Raises:
        UserError: the client is not installed, or the key cannot be one.
    """

    def __init__(self, args: JudgeArguments, cache: Path):
        """Read the verdicts given before; nothing is asked yet."""
        try:
            import openai

            from tinydpo.evaluation.pace import Pace
        except ImportError:
            raise UserError(
                "the judge's client is not installed; `make winrate` installs it, or pip install '.[judge]'"
            ) from None
        self._key = (os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError("the judge's key in the environment holds characters that no key has; set it anew")
        self.args, self.cache, self.asked, self._openai = args, cache, 0, openai
        self._pace, self._used = Pace(args.judge_concurrency, args.judge_timeout), set()
        self._rows = self._read()

    def compare(
        self, prompts: Sequence[str], policy: Sequence[str], opponent: Sequence[str], desc: str = "judge"
    ) -> list[float | None]:
        """The `outcome` of each of n pairs of answers, from `both_orders`."""
        return [get_outcome(*pair) for pair in self.both_orders(prompts, policy, opponent, desc)]

    def both_orders(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], desc: str = "judge"
    ) -> list[tuple[str, str]]:
        """The verdicts on each of n pairs of answers, the first as A, then as B; equal answers tie unasked.

        Raises:
            UserError: the judge cannot be asked; the verdicts it has given are kept.
        """
        texts = [[text.strip() for text in row] for row in zip(prompts, first, second, strict=True)]
        questions = []
        for prompt, a, b in texts:
            if a != b:
                questions += [QUESTION.format(prompt=prompt, a=a, b=b), QUESTION.format(prompt=prompt, a=b, b=a)]
        given = iter(self.verdicts(questions, desc))
        return [("tie", "tie") if a == b else (next(given), next(given)) for _, a, b in texts]

    def verdicts(self, questions: Sequence[str], desc: str = "judge") -> list[str]:
        """Each question's verdict, as `read_verdict` has it; only those never asked before are asked.

        Raises:
            UserError: the judge cannot be asked; the verdicts it has given are kept.
            Stopped: Ctrl-C; what is under way is not waited for.
        """
        keys = [self._hash(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._rows}
        try:
            asyncio.run(self._ask_all(missing, desc))
        except (self._openai.OpenAIError, UserError) as error:
            raise UserError(f"the judge at {self.args.judge_base_url} {self._told(error)}; {self._kept()}") from None
        except KeyboardInterrupt:
            raise Stopped(f"stopped by Ctrl-C; {self._kept()}", signal.SIGINT) from None
        self._used.update(keys)
        return [self._rows[key]["verdict"] for key in keys]

    def unreadable(self, pairs: str) -> UserError:
        """What to say where not one verdict on `pairs` is valid."""
        return UserError(
            f"none of {self.args.judge_model}'s verdicts on {pairs} can be read; its replies are in {self.cache}, try "
            "another --judge_model"
        )

    def tokens(self) -> dict[str, int]:
        """Tokens behind the verdicts given out, cached ones too, and how many of these were asked now or before."""
        rows = [self._rows[key] for key in self._used]
        return {
            "prompt": sum(row["prompt_tokens"] for row in rows),
            "completion": sum(row["completion_tokens"] for row in rows),
            "verdicts_asked": self.asked,
            "verdicts_cached": len(rows) - self.asked,
        }

    def _hash(self, question: str) -> str:
        identity = [self.args.judge_base_url, self.args.judge_model, question]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def _read(self) -> dict[str, dict[str, Any]]:
        rows = {}
        if not self.cache.exists():
            return rows
        text = self.cache.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                rows[row["key"]] = {name: row[name] for name in ("verdict", "prompt_tokens", "completion_tokens")}
            except (ValueError, KeyError, TypeError):  # the line that an interrupted run left half written
                continue
        if text and not text.endswith("\n"):
            with self.cache.open("a") as file:
                file.write("\n")
        return rows

    def _kept(self) -> str:
        return f"{len(self._rows)} verdicts are kept in {self.cache}, the same command goes on from there"

    async def _ask_all(self, questions: dict[str, str], desc: str) -> None:
        from tinydpo.evaluation.pace import PacedClient, ask_all

        async with self._openai.AsyncOpenAI(
            base_url=self.args.judge_base_url,
            api_key=self._key or "none",  # a local server wants none, the client wants one
            timeout=self.args.judge_timeout,
            max_retries=RETRIES,
            http_client=PacedClient(self._pace),
        ) as client:
            await ask_all(partial(self._ask, client), questions.items(), self._pace, desc)

    async def _ask(self, client: Any, item: tuple[str, str]) -> None:
        key, question = item
        reply, verdict, usage = await self._reply(client, question)
        row = {
            "key": key,
            "verdict": verdict,
            "prompt_tokens": getattr(usage, "prompt_tokens", None) or 0,  # some servers do not count
            "completion_tokens": getattr(usage, "completion_tokens", None) or 0,
        }
        told = {"judge": self.args.judge_model, "question": question, "reply": self._hide(reply)}
        with self.cache.open("a") as file:
            file.write(json.dumps(row | told) + "\n")
        self._rows[key] = row
        self.asked += 1

    async def _reply(self, client: Any, question: str) -> tuple[str, str, Any]:
        """The judge's text, its verdict, and the tokens it took if the endpoint counts them."""
        try:
            completion = await client.chat.completions.create(
                model=self.args.judge_model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
            choice = completion.choices[0]
            reply = str(choice.message.content or choice.message.refusal or "")
            cut = choice.finish_reason == "length"  # whatever stands last then, it is not the verdict
            return reply, "invalid" if cut else read_verdict(reply), completion.usage
        except self._openai.BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):  # a refusal, by the endpoint
                return "", "invalid", None
            raise
        except (ValueError, AttributeError, IndexError, TypeError):
            raise UserError("does not answer in OpenAI's chat protocol; check --judge_base_url") from None

    def _told(self, error: Exception) -> str:
        """What went wrong and what to do, without the key."""
        match error:
            case self._openai.AuthenticationError() | self._openai.PermissionDeniedError():
                return f"refuses the key ({error.status_code}); set JUDGE_API_KEY or OPENAI_API_KEY to one it accepts"
            case self._openai.NotFoundError():
                return (
                    f"does not know the address or the model {self.args.judge_model!r} (404); check --judge_base_url, "
                    "which mostly ends in /v1, and --judge_model"
                )
            case self._openai.APITimeoutError():
                return (
                    f"gave no reply within {self.args.judge_timeout:g} s, {RETRIES + 1} times; raise --judge_timeout"
                )
            case self._openai.APIStatusError():
                return self._hide(f"answers {error.status_code}: {error.message}")[:300]
            case self._openai.APIConnectionError():
                return self._hide(f"cannot be reached ({error.__cause__ or error})")
        return self._hide(str(error))

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


CONSISTENT_VERDICTS = {
    ("A", "B"),
    ("B", "A"),
    ("tie", "tie"),
}  # what a judge says in both orders that does not go by the order


def calibrate_judge(judge: Judge, texts: Dataset, tokenizer: Any, pairs: int, seed: int) -> dict[str, Any] | None:
    """Ask the judge about held-out pairs, chosen against rejected, whole as they were labelled.

    Args:
        judge: asked in both orders; it keeps its verdicts.
        texts: held-out rows as `pairs.FittedSplit.texts` has them.
        tokenizer: the policy's.
        pairs: the most pairs wanted, each of another prompt; 0 asks nothing.
        seed: picks them.

    Returns:
        The figures of `agreement`, or None where nothing was asked.

    Raises:
        UserError: the judge cannot be asked, or none of its verdicts can be read.
    """
    if not pairs:
        return None
    asked = get_readable_columns(choose_prompts(texts, pairs, seed), tokenizer, "chosen", "rejected")
    verdicts = judge.both_orders(asked["prompt"], asked["chosen"], asked["rejected"], "judge: labelled pairs")
    if (figures := judge_agreement(verdicts)) is None:
        raise judge.unreadable(f"{len(verdicts)} pairs of the data")
    return figures


def judge_agreement(verdicts: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """What n pairs of verdicts, with the chosen answer as A and as B, say of the judge; None if none is valid.

    Returns:
        Counts; `agreement`, the share of valid pairs whose chosen answer it prefers (ties half, as in a win rate) with
        its 95 % interval; and `turned_share`, the share on which its verdict is another in the other order.
    """
    outcomes = {pair: get_outcome(*pair) for pair in verdicts}
    valid = [pair for pair in verdicts if outcomes[pair] is not None]
    if not valid:
        return None
    scores = [outcomes[pair] for pair in valid]
    return {
        "pairs": len(verdicts),
        "agreed": scores.count(1.0),
        "ties": scores.count(0.5),
        "disagreed": scores.count(0.0),
        "invalid": len(verdicts) - len(valid),
        "agreement": sum(scores) / len(valid),
        "agreement_ci95": list(wilson_interval(sum(scores), len(valid))),
        "turned_share": sum(pair not in CONSISTENT_VERDICTS for pair in valid) / len(valid),
    }
