"""How fast a judge is asked: no faster than it answers.

A server on one's own machine often answers one question at a time. Asked eight at once, it keeps the last waiting
eight times as long; that one is given up and asked again while the server still computes what was given up, and soon
it computes nothing else.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import openai
from tqdm.auto import tqdm

from tinydpo.errors import print_stderr

EVERY = 30.0  # seconds between two lines where there is no terminal for a progress bar


class Pace:
    """How many questions may be under way: one more with each round of replies in good time, half with a late one.

    It begins with one. In good time is within half the time-out: the number is halved before anything is given up.

    Args:
        most: questions under way at once, at most.
        timeout: seconds after which a question is given up.
    """

    def __init__(self, most: int, timeout: float):
        """One question may be under way."""
        self.most, self.timeout = most, timeout
        self._allowed, self._halved = 1.0, float("-inf")

    @property
    def allowed(self) -> int:
        """Questions that may be under way now."""
        return int(self._allowed)

    def learn(self, sent: float, refused: bool = False) -> None:
        """Go by what became of the question sent at `sent` (`time.monotonic()`): a reply, a refusal or nothing yet."""
        now = time.monotonic()
        if not refused and now - sent <= self.timeout / 2:
            self._allowed = min(self.most, self._allowed + 1 / self.allowed)
        elif sent >= self._halved:  # what was sent earlier tells of the number before
            self._allowed, self._halved = max(1.0, self._allowed / 2), now


class PacedClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that asks at a `Pace` and tells it how the replies come; each try of a question is a request."""

    def __init__(self, pace: Pace):
        """Requests end after the pace's time-out."""
        super().__init__(timeout=pace.timeout)
        self._pace, self._under_way, self._turn = pace, 0, asyncio.Condition()

    async def send(self, *args: Any, **kwargs: Any) -> Any:
        """Send a request when its turn comes."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._under_way < self._pace.allowed)
            self._under_way += 1
        sent = time.monotonic()
        try:
            response = await super().send(*args, **kwargs)
            self._pace.learn(sent, refused=response.status_code == 429 or response.is_server_error)
            return response
        except Exception:
            if time.monotonic() - sent >= self._pace.timeout:
                self._pace.learn(sent)
                # Its turn stays taken as long again: the server may still compute what was given up, and asked again
                # at once it would only fall further behind.
                await asyncio.sleep(self._pace.timeout)
            raise
        finally:
            self._under_way -= 1
            async with self._turn:
                self._turn.notify_all()


async def ask_all(ask: Callable[[Any], Awaitable[None]], questions: Iterable[Any], pace: Pace, desc: str) -> None:
    """Ask each question, as many at once as `pace` allows; a progress bar, or a line now and then, says how far it is.

    After the first failure nothing more is asked. What is under way is paid for: it is waited for, and then the
    failure is raised.
    """
    waiting, under_way, failures = deque(questions), set(), []
    total, told = len(waiting), time.monotonic()
    with tqdm(desc=desc, total=total, leave=False, disable=None) as bar:
        while waiting or under_way:
            while waiting and len(under_way) < pace.allowed:
                under_way.add(asyncio.create_task(ask(waiting.popleft())))
            done, under_way = await asyncio.wait(under_way, timeout=EVERY, return_when=asyncio.FIRST_COMPLETED)
            failures += [error for task in done if (error := task.exception())]
            if failures:
                waiting.clear()
            bar.update(len(done))
            if bar.disable and time.monotonic() - told >= EVERY:
                told = time.monotonic()
                print_stderr(
                    f"{desc}: {total - len(waiting) - len(under_way)} of {total} verdicts, {len(under_way)} under way"
                )
    if failures:
        raise failures[0]
