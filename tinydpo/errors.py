"""A mistake of the user's is told in one sentence, without a traceback, and exits with status 1."""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Iterator

# What PyTorch's and safetensors' writers, which keep no errno, say of a disk that takes no more.
DISK_FULL_MESSAGES = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "] . unexpected pos ")


class UserError(Exception):
    """One sentence that names the file, row or key at fault and says what to do."""


class Stopped(BaseException):
    """The run was told to stop before its end, by the signal `by`, and has saved what it trained or was told.

    No `Exception`: whoever goes on after one run's mistake, as `frontier.py` does, must not go on after this.
    """

    def __init__(self, sentence: str, by: signal.Signals = signal.SIGTERM):
        """What was stopped, and how to go on."""
        super().__init__(sentence)
        self.by = by


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print a `UserError` as `error: …` on stderr and exit with status 1; any other exception keeps its traceback.

    A full disk, wherever it is met, is told like a `UserError`. A run that was `Stopped` says so and exits as if
    the signal had ended it: with 143 for SIGTERM, 130 for Ctrl-C, which ends in a sentence anywhere.
    """
    try:
        yield
    except Stopped as stop:
        if not get_rank():
            print_stderr(str(stop))
        raise SystemExit(128 + stop.by) from None
    except KeyboardInterrupt:  # where nothing had to be saved: training says more, see `Stopped`
        print_stderr("stopped by Ctrl-C; the same command goes on from what was saved")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if not (isinstance(error, UserError) or is_disk_full(error)):
            raise
        if get_rank():
            # All ranks meet the same mistake. Rank 0 speaks first and the launcher then ends the others; one that
            # is still alive after this pause met a mistake of its own.
            time.sleep(5)
        told = " ".join(str(error).split())
        if not isinstance(error, UserError):
            told = f"the disk takes no more ({told}); free some space and run the same command again: it goes on"
        print_stderr(f"error: {told}")
        raise SystemExit(1) from None


def print_stderr(sentence: str) -> None:
    """Write a line to stderr, where a progress bar under way would otherwise stand before it in the same line."""
    from tqdm.auto import tqdm

    tqdm.write(sentence, file=sys.stderr)
    sys.stderr.flush()


def get_rank() -> int:
    """This process's number among all of the run, by what its launcher said."""
    return int(os.environ.get("RANK", 0))


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of, as a traceback would show them, each once (an error can be its own cause)."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of whatever library, comes of a disk that takes no more."""
    return any(
        getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or any(told in str(one) for told in DISK_FULL_MESSAGES)
        for one in iter_causes(error)
    )
