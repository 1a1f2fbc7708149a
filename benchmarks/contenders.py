"""Five ways to train the same pairs: the earlier script, stock TRL twice, tinydpo, and it compiled, timed in turns.

A contender runs in a process of its own. It waits for its turn before each piece of timed work, so that one runs at a
time and their steps alternate.
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
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from tinydpo.training.trainers import SharedPrefixDPOTrainer

NAMES = {
    "a": "the earlier script's settings",
    "b": "TRL DPOTrainer, defaults",
    "c": "TRL DPOTrainer, all its flags",
    "d": "tinydpo",
    "e": "tinydpo, --torch_compile true",
}
OURS = "de"
BETA = 0.1
PADDED = 128  # tokens to which the earlier script padded every sequence
AT_ONCE = 4  # pairs that it took at a time


class Turns:
    """One contender's end of the pipe to the benchmark."""

    def __init__(self, pipe: Connection, device: str):
        """Take the pipe; on a GPU, time to the end of its queue."""
        self.pipe, self.wait = pipe, torch.cuda.synchronize if device == "cuda" else lambda: None

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
    turns = Turns(pipe, spec["device"])
    (earlier_script if name == "a" else with_trl)(name, spec, turns)
    cuda = spec["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.recv()
    pipe.send(("memory", peak))


def with_trl(name: str, spec: dict[str, Any], turns: Turns) -> None:
    """Contenders b to e."""

    class Callback(TrainerCallback):
        """Has a turn for every optimizer step."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.block = turns.turn("step")
            self.block.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.block.__exit__(None, None, None)

    class Timed(SharedPrefixDPOTrainer if name in OURS else DPOTrainer):
        """Has a turn for the reference pass, and one for the check of packed rows."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset  # fitted pairs for all

        def _precompute_ref_logps(self, *args: Any) -> Dataset:
            if name in OURS:
                with turns.turn("check"):
                    self._pack()
                    if name == "e":  # compile here: the reference pass is timed as if it were long
                        rows = [self.train_dataset[i] for i in range(spec["pairs_per_step"])]
                        self.compute_ref_log_probs(self.model, self._prepare_inputs(self.data_collator(rows)))
            with turns.turn("reference"):
                return super()._precompute_ref_logps(*args)

    pairs = Dataset.from_list(spec["pairs"])  # in memory: no reference pass of an earlier run is found on disk
    flags = {}
    if name != "b":
        flags |= {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    if name == "c":
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs]
        pairs = pairs.add_column("length", lengths)
        flags |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    cuda = spec["device"] == "cuda"
    torch.set_float32_matmul_precision("medium" if spec["dtype"] == "bfloat16" and name in OURS else "highest")
    args = DPOConfig(
        output_dir=spec["folder"], per_device_train_batch_size=spec["pairs_per_step"], num_train_epochs=1, beta=BETA,
        use_cpu=not cuda, bf16=spec["dtype"] == "bfloat16", save_strategy="no", report_to="none", disable_tqdm=True,
        torch_compile=name == "e", **flags,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    row_length = {"row_length": spec["row_length"]} if name in OURS else {}
    trainer = Timed(
        model=spec["model"], args=args, train_dataset=pairs, processing_class=tokenizer, callbacks=[Callback()],
        **row_length,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def earlier_script(name: str, spec: dict[str, Any], turns: Turns) -> None:
    """Contender a: padded to 128, 4 pairs at a time, checkpointing, reference forward every step, full logits."""
    policy, ref = (AutoModelForCausalLM.from_pretrained(spec["model"]).to(spec["device"]) for _ in range(2))
    policy.gradient_checkpointing_enable()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    pairs, size = spec["pairs"], spec["pairs_per_step"]
    autocast = torch.autocast(spec["device"], torch.bfloat16, enabled=spec["dtype"] == "bfloat16")
    for start in range(0, len(pairs), size):
        with turns.turn("step"):
            for first in range(start, start + size, AT_ONCE):
                batch = _padded(pairs[first : first + AT_ONCE], spec["device"])
                with autocast:
                    with torch.no_grad():
                        ref_logps = _sequence_logps(ref, batch)
                    chosen, rejected = (_sequence_logps(policy, batch) - ref_logps).chunk(2)
                loss = -logsigmoid(BETA * (chosen - rejected)).sum() / size
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()


def _padded(pairs: list[dict], device: str) -> dict[str, torch.Tensor]:
    sequences = [(p["prompt_ids"], p[part]) for part in ("chosen_ids", "rejected_ids") for p in pairs]
    ids = torch.zeros(len(sequences), PADDED, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = 1
    return {name: value.to(device) for name, value in zip(("ids", "labels", "mask"), (ids, labels, mask), strict=True)}


def _sequence_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(-1)
