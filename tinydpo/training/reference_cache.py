"""Where TRL's cache of reference log-probs would be wrong: a split model's key, and machines with caches of their own.

TRL names the cache by a hash of the weights. Under ZeRO-3 those are empty outside a gather, so that every model of a
shape had the same name and got the log-probs of the first. And its first process alone writes the file, which the
processes of another machine then look for in their own file system.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer.utils import hash_module


def hash_split(model: torch.nn.Module) -> list[str]:
    """A hash of each parameter of a model that ZeRO-3 splits, gathered one at a time; all processes call it."""
    import deepspeed

    hashes = []
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            hashes.append(hash_module(torch.nn.ParameterList([parameter])))
    return hashes


@contextlib.contextmanager
def on_every_machine(accelerator: Accelerator, cache: Path) -> Iterator[None]:
    """Have the first process of every machine write the cache, and all of them make it anew where one lacks it.

    Otherwise those that have it would go on while the others wait for their share of the work.
    """
    if accelerator.num_processes > 1 and not all(gather_object([cache.exists()])):
        accelerator.wait_for_everyone()
        cache.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    local = property(lambda self: self.is_local_main_process)
    with patch.object(Accelerator, "is_main_process", local):
        yield
