"""How many pairs a second: the earlier script, stock TRL twice and tinydpo, on the same pairs, model and dtype.

    make bench                                                (the quickstart's pairs, GPT-2 small's shape)
    make bench ARGS="--dataset_name my_pairs.jsonl --tokenizer_name openai-community/gpt2"
    make bench ARGS="--device cuda --model gpt2-medium --pairs_per_step 64 --steps 50 …"
    make bench ARGS="--contenders de --steps 10"              (does --torch_compile pay here?)

One epoch, its reference pass counted in. Weights are random: they do not change the time. Steps of the contenders
alternate, so that a slow minute of the machine hits them all; the first step of each warms up and is not counted. The
matmul rate is this machine's own, in products of the blocks' shapes, measured before and after.
"""

import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import contenders
import torch
from models import SHAPES, save_random_model, tokenizer_and_data
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

    model: str = field(default="gpt2-small", metadata={"help": f"One of {', '.join(SHAPES)}, or a model's folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "With --dataset_name: folder or Hub id."})
    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where to measure."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: what training takes on the device."}
    )
    pairs_per_step: int = field(default=8, metadata={"help": "Pairs in one optimizer step; a multiple of 4."})
    steps: int = field(default=3, metadata={"help": "Steps that are timed, after one that is not."})
    max_length: int = field(default=128, metadata={"help": "Tokens of prompt + completion."})
    row_length: int | None = field(default=None, metadata={"help": "Tokens in a packed row, by default as in dpo.py."})
    contenders: str = field(default="abcd", metadata={"help": "Which of a, b, c, d and e to run."})
    threads: int = field(default=torch.get_num_threads(), metadata={"help": "CPU threads of each contender."})
    output: str = field(default="runs/bench/throughput.json", metadata={"help": "Where the figures go."})

    def __post_init__(self):
        """Rows as long as `scripts/dpo.py` has them; refuse shorter ones (ValueError)."""
        self.row_length = resolve_row_length(self.max_length, self.row_length)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if has_fast_bf16(self.device) else "float32"


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(BenchArguments, DataArguments, argv=argv)
    if not args.contenders or set(args.contenders) - set(contenders.NAMES) or args.steps < 1:
        raise UserError("--contenders takes letters of abcde, as in bd, and --steps at least 1")
    if "a" in args.contenders and (args.pairs_per_step % contenders.AT_ONCE or args.max_length > contenders.PADDED):
        raise UserError("(a) takes 4 pairs at a time and pads to 128: change --pairs_per_step, or --contenders bcd")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; leave it out to measure on the CPU")
    if args.dtype == "bfloat16" and not has_fast_bf16(args.device):
        print("This device has no fast bf16: it is slower here than float32, and says nothing of other machines.")
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare(args, data, Path(folder))
        before = matmul_rate(spec)
        seconds = measure(args, spec)
    results = summarize(args, spec, seconds, statistics.mean([before, matmul_rate(spec)]))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.output), results)
    print(table(results) + f"\nWritten to {args.output}.")


def prepare(args: BenchArguments, data: DataArguments, folder: Path) -> dict[str, Any]:
    """The same pairs, model and settings for every contender."""
    given = data.dataset_name
    tokenizer = tokenizer_and_data(data, args.tokenizer_name, args.model, folder)
    count = args.pairs_per_step * (args.steps + 1)
    pairs = load_split(data, tokenizer, args.max_length, "train").pairs.shuffle(seed=0)
    if len(pairs) < count:
        raise UserError(f"{args.steps} steps and a warm-up need {count} pairs, there are {len(pairs)}; lower --steps")
    pairs = pairs.select(range(count)).select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
    answers = statistics.mean(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    tokens = answers + statistics.mean(len(row["prompt_ids"]) for row in pairs)
    model = save_random_model(args.model, tokenizer, folder / "model")
    return {
        "dataset": given, "model": str(folder / "model"), "folder": str(folder / "out"),
        "device": args.device, "dtype": args.dtype, "threads": args.threads,
        "width": model.config.get_text_config().hidden_size,
        "pairs": pairs, "pairs_per_step": args.pairs_per_step, "row_length": args.row_length,
        "tokens": tokens, "forward_flop": forward_flop(model, tokens, answers),  # of a mean pair
    }  # fmt: skip


def matmul_rate(spec: dict[str, Any], rounds: int = 5) -> float:
    """FLOP a second of this machine in the blocks' products, forward and backward: the median of a few rounds."""
    torch.set_num_threads(spec["threads"])
    width, device, dtype = spec["width"], spec["device"], getattr(torch, spec["dtype"])
    tokens = int(spec["tokens"] * spec["pairs_per_step"])
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]  # of a GPT-2 block
    rates = []
    for turn in range(rounds + 1):
        seconds = flop = 0.0
        for inside, outside in shapes:
            x = torch.randn(tokens, inside, device=device, dtype=dtype, requires_grad=True)
            weight = torch.randn(outside, inside, device=device, dtype=dtype, requires_grad=True)
            gradient = torch.randn(tokens, outside, device=device, dtype=dtype)
            wait()
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight).backward(gradient)
            wait()
            seconds, flop = seconds + time.perf_counter() - start, flop + 6 * tokens * inside * outside
        if turn:
            rates.append(flop / seconds)
    return statistics.median(rates)


def measure(args: BenchArguments, spec: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contender by phase, and its peak memory in bytes."""
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar over the reference pass
    context = multiprocessing.get_context("spawn")
    pipes, measured = {}, {name: {} for name in args.contenders}
    for name in args.contenders:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contenders.run, args=(name, spec, theirs), daemon=True).start()
        theirs.close()
    waiting = list(args.contenders)
    while waiting:
        for name in list(waiting):
            try:
                pipes[name].send("go")
                phase, value = pipes[name].recv()
            except (EOFError, BrokenPipeError):
                raise UserError(f"contender ({name}) ended early; its own message stands above") from None
            measured[name].setdefault(phase, []).append(value)
            print(f"({name}) {phase} {value:.4g}", flush=True)
            if phase == "memory":
                waiting.remove(name)
    return measured


def summarize(
    args: BenchArguments, spec: dict[str, Any], measured: dict[str, dict[str, list[float]]], machine: float
) -> dict:
    """Rates of one epoch over the timed steps' pairs, their share of the reference pass included; `machine` is the
    rate of its matrix products, in FLOP a second."""
    tokens, forward = spec["tokens"], spec["forward_flop"]
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    peak = get_peak_flops(gpu, args.dtype) if gpu else None
    rows = {}
    for name, phases in measured.items():
        share = sum(phases.get("reference", [0.0])) / (args.steps + 1)
        rounds = [seconds + share for seconds in phases["step"][1:]]
        rate = args.pairs_per_step * args.steps / sum(rounds)
        rows[name] = {
            "contender": contenders.NAMES[name], "pairs_per_second": rate, "tokens_per_second": rate * tokens,
            "share_of_matmul_rate": rate * 4 * forward / machine,
            "peak_memory_gib": phases["memory"][0] / 2**30, "mfu": rate * 4 * forward / peak if peak else None,
            "seconds_a_step": statistics.median(rounds), "rounds": rounds, "phases": phases,
        }  # fmt: skip
    if "d" in rows:
        for row in rows.values():
            ratios = [theirs / ours for theirs, ours in zip(row["rounds"], rows["d"]["rounds"], strict=True)]
            ratio = rows["d"]["pairs_per_second"] / row["pairs_per_second"]
            row |= {"tinydpo_is_faster_by": ratio, "spread": [min(ratios), max(ratios)]}
    return {
        "model": args.model, "device": gpu or f"{args.threads} threads of {platform.machine()}",
        "dtype": args.dtype, "matmul_flop_per_second": machine, "pairs_per_step": args.pairs_per_step,
        "steps": args.steps,
        "dataset": Path(data_name).name if (data_name := spec["dataset"]) else "the quickstart's",
        "tokens_per_pair": tokens, "forward_flop_per_pair": forward, "torch": torch.__version__, "contenders": rows,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    gpu = any(row["mfu"] for row in results["contenders"].values())
    lines = [
        f"{results['model']}, {results['dtype']}, {results['device']}; {results['pairs_per_step']} pairs a step, "
        f"{results['steps']} steps, {results['tokens_per_pair']:.0f} tokens a pair; data: {results['dataset']}",
        "",
        "| | contender | tinydpo is faster by (steps' range) | pairs/s | tokens/s | of the matmul rate | peak memory |"
        + " MFU |" * gpu,
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * gpu,
    ]
    for name, row in results["contenders"].items():
        low, high = row.get("spread", (1, 1))
        lines.append(
            f"| {name} | {row['contender']} | {row.get('tinydpo_is_faster_by', 1):.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['pairs_per_second']:.3g} | {row['tokens_per_second']:.3g} | {row['share_of_matmul_rate']:.0%} "
            f"| {row['peak_memory_gib']:.2f} GiB |" + (f" {row['mfu']:.1%} |" if gpu else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
