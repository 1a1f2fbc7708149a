"""A mistake of the user's is told in one sentence, without a traceback, and exits with status 1."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator


class UserError(Exception):
    """One sentence that names the file, row or key at fault and says what to do."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Print a `UserError` as `error: …` on stderr and exit with status 1; any other exception keeps its traceback."""
    try:
        yield
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:
            # All ranks meet the same mistake. Rank 0 speaks first and the launcher then ends the others; one that
            # is still alive after this pause met a mistake of its own.
            time.sleep(5)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
