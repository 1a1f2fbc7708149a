"""Runs a script as its own main program, with FSDP2 sharding models on CPUs.

PyTorch's FSDP2 can do that with gloo, but accelerate silently turns it into plain data parallelism there. So several
processes on CPUs pass for several GPUs at the one place where accelerate decides.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

set_up = PartialState.__init__


def like_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    set_up(self, *args, **kwargs)
    if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = like_gpus
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
