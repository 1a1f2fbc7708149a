"""Errors as a user sees them: one sentence without a traceback, and exit status 1."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator

# How PyTorch's and safetensors' writers report a full disk; they set no errno.
DISK_FULL_MESSAGES = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "] . unexpected pos ")
# Control characters of ASCII and Latin-1, and the Unicode ones that break lines or turn the direction of text.
CONTROLS = re.compile(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class UserError(Exception):
    """One sentence that names the file, row or key at fault and says what to do."""


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or the launcher's end stopped the run early; the arguments are a sentence and the signal.

    Not an `Exception`: a loop over runs that skips failed ones, as in `frontier.py`, must not continue after this.
    """


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print a `UserError` or what a file system refuses as `error: …` on stderr, and exit with 1.

    Other errors keep their traceback. The exit status is 143 after SIGTERM and 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Printing β must not end a run whose terminal or log is not UTF-8.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except Stopped as stop:
        message, number = stop.args
        if get_rank() == 0:
            print_stderr(message)
        raise SystemExit(128 + number) from None
    except KeyboardInterrupt:
        print_stderr("interrupted; run the same command again")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(error, UserError):
            pass
        elif is_disk_full(error):
            message = f"the disk is full ({message}); free some space and run the same command again: it resumes"
        elif not isinstance(error, OSError):
            raise
        elif error.filename:
            message = f"{error.filename}: {error.strerror}"
        if get_rank() > 0:
            # All ranks have the same error. Rank 0 prints it, and the launcher ends the others during this pause.
            time.sleep(5)
        print_stderr(f"error: {escape_controls(message)}")
        raise SystemExit(1) from None


def print_stderr(line: str) -> None:
    """Write a line to stderr, below a progress bar if one is running."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def escape_controls(text: str, keep: str = "") -> str:
    """Text of the data as a terminal may show it: its control characters as Python writes them, such as `\\x1b`."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def get_rank() -> int:
    """This process's number among all of the run, as its launcher set it."""
    return int(os.environ.get("RANK", 0))


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, as a traceback would show them, each once (an error can be its own cause)."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of whatever library, is caused by a full disk."""
    for cause in iter_causes(error):
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(message in str(cause) for message in DISK_FULL_MESSAGES):
            return True
    return False
