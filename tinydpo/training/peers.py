"""A process of a run that dies ends the others too: at once where the network tells of it, and with a sentence.

Without this, those that wait for it end in a traceback of gloo's, which names an address and no remedy, or never.
"""

import contextlib
import os
import time
from collections.abc import Iterator

from tinydpo.errors import iter_causes, print_stderr

STARTED_BY = os.getppid()  # read at once: who starts a script may be gone before its first step
GLOO = "gloo/transport"  # its errors are plain RuntimeErrors that begin with the file in gloo's source
# What gloo and NCCL say of others, and not of a wrong setting on this machine.
GONE = ("closed", "reset", "broken pipe", "timed out", "timeout", "remote")


@contextlib.contextmanager
def report_lost_peers() -> Iterator[None]:
    """Around all that processes do together: end this one with a sentence and status 1 when another is gone.

    Gone is who closed its connections, as the system does for a killed process, or did not answer for `--ddp_timeout`
    seconds.
    """
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not (sign := find_lost_peer(error)):
            raise
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(5)  # one voice a machine: meanwhile the launcher ends the others
        reason = sign.splitlines()[0].partition(". ")[0]
        print_stderr(
            "error: another process of this run died or does not answer any more, its own log says why; run the same "
            f"command on every machine again: it goes on from the last checkpoint ({reason})"
        )
        os._exit(1)  # the orderly way out would wait for the lost process


def find_lost_peer(error: BaseException) -> str:
    """What the network said of another process that is gone, or "" where an error comes of something else."""
    from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

    for one in iter_causes(error):
        between = isinstance(one, (DistBackendError, DistNetworkError, DistStoreError)) or GLOO in str(one)
        if between and any(sign in str(one).lower() for sign in GONE):
            return str(one)
    return ""
