"""Four ways to train the same pairs: stock TRL twice, tinydpo, and tinydpo compiled, timed in turns.

A contender runs in a process of its own. It waits for its turn before each piece of timed work, so that only one runs
at a time and their steps alternate.
"""

import resource
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from tinydpo.training.trainers import SharedPrefixDPOTrainer

NAMES = {
    "trl": "TRL `DPOTrainer`, defaults",
    "trl-tuned": "TRL, no checkpointing, precomputed reference, grouped by length",
    "tinydpo": "tinydpo",
    "compiled": "tinydpo, `--torch_compile true`",
}
LETTERS = dict(zip("bcde", NAMES, strict=True))  # `--contenders bd`: short, as scripts of several benchmarks have it
PACKED = ("tinydpo", "compiled")


class Turns:
    """One contender's end of the pipe to the benchmark."""

    def __init__(self, pipe: Connection, device: str):
        self.pipe = pipe
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None  # to the end of the GPU's queue

    @contextmanager
    def turn(self, phase: str) -> Iterator[None]:
        """Wait to be called, then report how many seconds the block took."""
        self.pipe.recv()
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.pipe.send((phase, time.perf_counter() - start))


def run(name: str, spec: dict[str, Any], pipe: Connection) -> None:
    """Train one epoch of `spec["pairs"]` as contender `name` does, then report the peak memory in bytes."""
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(spec["threads"])
    train(name, spec, Turns(pipe, spec["device"]))
    if spec["device"] == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.recv()
    pipe.send(("memory", peak))


def train(name: str, spec: dict[str, Any], turns: Turns) -> None:
    """One epoch with TRL's trainer or ours, a turn for every step and every batch of the reference pass."""

    class TimeSteps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.block = turns.turn("step")
            self.block.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.block.__exit__(None, None, None)

    class TimedTrainer(SharedPrefixDPOTrainer if name in PACKED else DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset  # fitted pairs for all

        def compute_ref_log_probs(self, *args: Any) -> Any:
            if name == "trl":  # inside a step, which is timed already
                return super().compute_ref_log_probs(*args)
            with turns.turn("reference"):
                return super().compute_ref_log_probs(*args)

    pairs = Dataset.from_list(spec["pairs"])  # in memory: no reference pass of an earlier run is found on disk
    flags = {}
    if name != "trl":
        flags |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        # As scripts/dpo.py: losses are not read at each batch, and copies to a GPU are not waited for.
        flags |= {"logging_nan_inf_filter": False, "accelerator_config": {"non_blocking": spec["device"] == "cuda"}}
    if name == "trl-tuned":
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs]
        pairs = pairs.add_column("length", lengths)
        flags |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    bf16 = spec["dtype"] == "bfloat16"
    torch.set_float32_matmul_precision("medium" if bf16 and name in PACKED else "highest")
    args = DPOConfig(
        output_dir=spec["folder"],
        per_device_train_batch_size=spec["pairs_per_step"],
        num_train_epochs=1,
        beta=0.1,
        use_cpu=spec["device"] != "cuda",
        bf16=bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=name == "compiled",
        **flags,
    )
    trainer = TimedTrainer(
        model=spec["model"],
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[TimeSteps()],
        **({"row_length": spec["row_length"]} if name in PACKED else {}),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
