"""Base model to report against the clock: SFT, reference pass, one DPO epoch, evaluation, by the project's recipes.

    make speedrun                                      (a GPU: GPT-2 Medium, 160,800 pairs; a CPU: a sample of both)
    make speedrun ARGS="--num_train_epochs 3"
    make speedrun ARGS="--max_length 512"              (the uncut recipe)

Weights are random, and pairs are drawn with replacement from those given until they are as many as HH's, 160,800 to
train on and 8,552 to evaluate: times as with the real ones, figures of quality without meaning.
"""

import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from models import save_random_model, tokenizer_and_data

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError, report_errors
from tinydpo.files import write_json

RECIPE = "recipes/gpt2-medium-hh"
HH_TRAIN, HH_TEST = 160_800, 8_552
EARLIER_HOURS = {128: 7, 512: 208}  # three epochs of the earlier script
MARK = ".speedrun"  # only a folder that holds this file is emptied
GPU = torch.cuda.is_available()


@dataclass
class SpeedrunArguments:
    """What to run."""

    model: str = field(
        default="gpt2-medium" if GPU else "gpt2-tiny",
        metadata={"help": "gpt2-tiny, gpt2-small, gpt2-medium, gpt2-large, or a model's folder."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "With --dataset_name: folder or Hub id."})
    train_pairs: int = field(default=HH_TRAIN if GPU else 320, metadata={"help": "Pairs to train on."})
    test_pairs: int = field(default=HH_TEST if GPU else 64, metadata={"help": "Pairs to evaluate."})
    num_prompts: int = field(default=512 if GPU else 16, metadata={"help": "Prompts that both models answer."})
    num_train_epochs: int = field(default=1, metadata={"help": "Epochs of DPO; SFT runs one."})
    max_length: Literal[128, 512] = field(default=128, metadata={"help": "Which of the two recipes."})
    output_dir: str = field(default="runs/speedrun", metadata={"help": "Emptied first."})


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(SpeedrunArguments, DataArguments, argv=argv)
    folder = Path(args.output_dir)
    if folder.exists() and not (folder / MARK).exists():
        raise UserError(f"--output_dir {folder} holds something else than a speedrun; pass another")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    given = Path(data.dataset_name).name if data.dataset_name else "the quickstart's"
    tokenizer = tokenizer_and_data(data, args.tokenizer_name, args.model, folder / "given")
    save_random_model(args.model, tokenizer, folder / "base")
    splits = load_pairs(data, tokenizer, args.max_length)
    for split, count in (("train", args.train_pairs), ("test", args.test_pairs)):
        resample(splits[split].texts, count, folder / f"data/{split}.jsonl")

    end, sft, dpo = "-512" if args.max_length == 512 else "", folder / "sft", folder / "dpo"
    start, stages = time.monotonic(), {}
    stages["SFT"] = stage("sft", end, model_name_or_path=folder / "base", output_dir=sft)
    epochs = args.num_train_epochs
    stages["reference pass and DPO"] = stage(
        "dpo", end, model_name_or_path=sft, output_dir=dpo, num_train_epochs=epochs
    )
    stages["evaluation"] = stage(
        "evaluate", end, model_name_or_path=dpo, ref_model_name_or_path=sft, output_dir=folder / "evaluation",
        num_prompts=args.num_prompts,
    )  # fmt: skip
    results = {
        "model": args.model, "max_length": args.max_length, "epochs": epochs, "pairs": args.train_pairs,
        "test_pairs": args.test_pairs, "drawn_from": given, "device": torch.cuda.get_device_name() if GPU else "CPU",
        "torch": torch.__version__, "seconds": stages, "total_seconds": time.monotonic() - start,
    }  # fmt: skip
    write_json(folder / "speedrun.json", results)
    print(table(results) + f"\nWritten to {folder / 'speedrun.json'}.")


def resample(texts: Dataset, count: int, path: Path) -> None:
    """Write `count` rows drawn with replacement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = texts.select_columns(["prompt", "chosen", "rejected"])
    Dataset.from_list(random.Random(0).choices(texts.to_list(), k=count)).to_json(path)


def stage(script: str, end: str, **flags: Any) -> float:
    """Run one of the project's scripts as a user would, and return its seconds."""
    command = [sys.executable, f"scripts/{script}.py", "--config", f"{RECIPE}/{script}{end}.yaml"]
    data = Path(flags["output_dir"]).parent / "data"
    command += [part for k, v in {**flags, "dataset_name": data}.items() for part in (f"--{k}", str(v))]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{script}.py ended with an error; its own message stands above")
    return time.monotonic() - start


def table(results: dict[str, Any]) -> str:
    """The times as Markdown."""
    full = (results["pairs"], results["test_pairs"]) == (HH_TRAIN, HH_TEST)
    what = f"{results['model']}, {results['max_length']} tokens, {results['epochs']} DPO epoch(s)"
    size = "HH's full size" if full else f"{results['pairs']:,} pairs, not HH's full size"
    lines = [
        f"\n{what}, {results['device']}; {size}, drawn with replacement from {results['drawn_from']} pairs, "
        "random weights: timing only",
        "",
        "| stage | minutes |",
        "| --- | --- |",
        *(f"| {name} | {seconds / 60:.1f} |" for name, seconds in results["seconds"].items()),
        f"| all | {results['total_seconds'] / 60:.1f} |",
    ]
    if full and results["device"] != "CPU" and results["model"] == "gpt2-medium":
        lines.append(f"\nThe earlier script took {EARLIER_HOURS[results['max_length']]} hours for three epochs.")
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
