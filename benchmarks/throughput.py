"""How many pairs a second: stock TRL twice and tinydpo twice, on the same pairs, model and dtype.

    make bench                                                (the toy task's pairs, GPT-2 small's shape)
    make bench ARGS="--dataset_name my_pairs.jsonl --tokenizer_name openai-community/gpt2"
    make bench ARGS="--device cuda --model gpt2-medium --pairs_per_step 64 --steps 30"
    make bench ARGS="--contenders tinydpo compiled --steps 10"     (does --torch_compile pay here?)

One epoch of DPO with its reference pass. Weights are random: they do not change the time. Steps of the contenders
alternate, so that a slow minute of the machine hits them all. The first step of each warms up and is not counted.
"""

import multiprocessing
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import contenders
import torch
from models import SHAPES, load_tokenizer_and_data, name_data, save_random_model
from transformers.hf_argparser import HfArg
from trl.trainer.utils import get_peak_flops

from tinydpo.config.arguments import DataArguments, resolve_row_length
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import UserError, report_errors
from tinydpo.files import write_json
from tinydpo.models.precision import has_fast_bf16
from tinydpo.training.throughput import forward_flop


@dataclass
class BenchArguments:
    """What to measure."""

    model: str = HfArg(default="gpt2-small", help=f"One of {', '.join(SHAPES)}, or a model's folder.")
    tokenizer_name: str | None = HfArg(default=None, help="With --dataset_name: folder or Hub id.")
    device: Literal["cpu", "cuda"] = HfArg(default="cpu", help="Where to measure.")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(
        default="auto", help="auto: what training takes on the device."
    )
    pairs_per_step: int = HfArg(default=8, help="Pairs in one optimizer step.")
    steps: int = HfArg(default=3, help="Steps that are timed, after one that is not.")
    max_length: int = HfArg(default=128, help="Tokens of prompt + completion.")
    row_length: int | None = HfArg(default=None, help="Tokens in a packed row, by default as in dpo.py.")
    contenders: list[str] = HfArg(
        default_factory=lambda: ["trl", "trl-tuned", "tinydpo"], help=f"Which to run: {', '.join(contenders.NAMES)}."
    )
    threads: int = HfArg(default=torch.get_num_threads(), help="CPU threads of each contender.")
    output: str = HfArg(default="runs/bench/throughput.json", help="Where the figures go.")

    def __post_init__(self):
        letters = "".join(self.contenders)
        if set(letters) <= set(contenders.LETTERS):
            self.contenders = [contenders.LETTERS[letter] for letter in letters]
        unknown = set(self.contenders) - set(contenders.NAMES)
        if unknown:
            raise ValueError(f"contenders must be some of {', '.join(contenders.NAMES)}, not {unknown}")
        self.row_length = resolve_row_length(self.max_length, self.row_length)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if has_fast_bf16(self.device) else "float32"


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(BenchArguments, DataArguments, argv=argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; leave it out to measure on the CPU")
    if args.dtype == "bfloat16" and not has_fast_bf16(args.device):
        print("This device has no fast bf16: it is slower than float32 here, which says nothing about other machines.")
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare_spec(args, data, Path(folder))
        measured = run_contenders(args, spec)
    results = summarize(args, spec, measured)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)
    print(f"{format_table(results)}\nWritten to {output}.")


def prepare_spec(args: BenchArguments, data: DataArguments, folder: Path) -> dict[str, Any]:
    """The same pairs, model and settings for every contender."""
    dataset = name_data(data)
    tokenizer = load_tokenizer_and_data(data, args.tokenizer_name, args.model, folder)
    count = args.pairs_per_step * (args.steps + 1)
    pairs = load_split(data, tokenizer, args.max_length, "train").pairs.shuffle(seed=0)
    if len(pairs) < count:
        raise UserError(f"{args.steps} steps and a warm-up need {count} pairs, there are {len(pairs)}; lower --steps")
    pairs = pairs.select(range(count)).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
    answers = statistics.mean(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    tokens = answers + statistics.mean(len(row["prompt_ids"]) for row in pairs)
    model = save_random_model(args.model, tokenizer, folder / "model")
    return {
        "dataset": dataset,
        "model": str(folder / "model"),
        "folder": str(folder / "out"),
        "device": args.device,
        "dtype": args.dtype,
        "threads": args.threads,
        "pairs": pairs,
        "pairs_per_step": args.pairs_per_step,
        "row_length": args.row_length,
        "tokens": tokens,  # of a mean pair, and so below
        "forward_flop": forward_flop(model, tokens, answers),
    }


def run_contenders(args: BenchArguments, spec: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contender by phase ("reference", "step"), and its peak memory in bytes ("memory")."""
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar over the reference pass
    context = multiprocessing.get_context("spawn")
    pipes = {}
    measured = {name: {} for name in args.contenders}
    for name in args.contenders:
        pipes[name], child = context.Pipe()
        context.Process(target=contenders.run, args=(name, spec, child), daemon=True).start()
        child.close()
    while pipes:
        for name, pipe in list(pipes.items()):
            try:
                pipe.send("go")
                phase, value = pipe.recv()
            except (EOFError, BrokenPipeError):
                raise UserError(f"contender {name} ended early; its own message stands above") from None
            measured[name].setdefault(phase, []).append(value)
            print(f"{name}: {phase} {value:.4g}", flush=True)
            if phase == "memory":
                del pipes[name]
    return measured


def summarize(args: BenchArguments, spec: dict[str, Any], measured: dict[str, dict[str, list[float]]]) -> dict:
    """Rates over the timed steps, each with its share of the reference pass."""
    tokens = spec["tokens"]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    peak = get_peak_flops(gpu, args.dtype) if gpu else None
    rows = {}
    for name, phases in measured.items():
        reference = statistics.mean(phases["reference"][1:]) if "reference" in phases else 0.0
        rounds = [seconds + reference for seconds in phases["step"][1:]]
        rate = args.pairs_per_step * args.steps / sum(rounds)
        flop = rate * 4 * spec["forward_flop"]  # forward and backward of the policy, forward of the reference
        rows[name] = {
            "contender": contenders.NAMES[name],
            "pairs_per_second": rate,
            "tokens_per_second": rate * tokens,
            "peak_memory_gib": phases["memory"][0] / 2**30,
            "flop_per_second": flop,
            "mfu": flop / peak if peak else None,
            "rounds": rounds,
            "phases": phases,
        }
    if "tinydpo" in rows:
        ours = rows["tinydpo"]
        for row in rows.values():
            ratios = [theirs / mine for theirs, mine in zip(row["rounds"], ours["rounds"], strict=True)]
            row["tinydpo_is_faster_by"] = ours["pairs_per_second"] / row["pairs_per_second"]
            row["spread"] = [min(ratios), max(ratios)]
    return {
        "model": args.model,
        "device": gpu or f"{args.threads} threads of {platform.machine()}",
        "dtype": args.dtype,
        "pairs_per_step": args.pairs_per_step,
        "steps": args.steps,
        "dataset": spec["dataset"],
        "tokens_per_pair": tokens,
        "forward_flop_per_pair": spec["forward_flop"],
        "torch": torch.__version__,
        "contenders": rows,
    }


def format_table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{results['model']}, {results['dtype']}, {results['device']}; {results['pairs_per_step']} pairs a step, "
        f"{results['steps']} steps, {results['tokens_per_pair']:.0f} tokens a pair; data: {results['dataset']}",
        "",
        "| contender | tinydpo is faster by (range of the steps) | pairs/s | tokens/s | peak memory | MFU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["contenders"].values():
        ratio = "–"  # tinydpo itself, or it was not measured
        if "spread" in row:
            low, high = row["spread"]
            ratio = f"{row['tinydpo_is_faster_by']:.2f} ({low:.2f} to {high:.2f})"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "peak not known"
        lines.append(
            f"| {row['contender']} | {ratio} | {row['pairs_per_second']:.3g} | {row['tokens_per_second']:.3g} "
            f"| {row['peak_memory_gib']:.2f} GiB | {mfu} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
