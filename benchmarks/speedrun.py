"""Base model to report against the clock: SFT, reference pass, one DPO epoch, evaluation, by the project's recipes.

    make speedrun                                      (a GPU: GPT-2 Medium, 160,800 pairs; a CPU: a sample of both)
    make speedrun ARGS="--num_train_epochs 3"
    make speedrun ARGS="--max_length 512"              (the paper's length)

Weights are random, and pairs are drawn with replacement from those given until they are as many as HH's, 160,800 to
train on and 8,552 to evaluate. Times are as with the real ones, figures of quality have no meaning.
"""

import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from models import load_tokenizer_and_data, name_data, save_random_model
from transformers.hf_argparser import HfArg

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError, report_errors
from tinydpo.files import write_json

RECIPE = "recipes/gpt2-medium-hh"
HH_TRAIN, HH_TEST = 160_800, 8_552
MARK = ".speedrun"  # only a folder that holds this file is emptied
GPU = torch.cuda.is_available()


@dataclass
class SpeedrunArguments:
    """What to run."""

    model: str = HfArg(
        default="gpt2-medium" if GPU else "gpt2-tiny",
        help="gpt2-tiny, gpt2-small, gpt2-medium, gpt2-large, or a model's folder.",
    )
    tokenizer_name: str | None = HfArg(default=None, help="With --dataset_name: folder or Hub id.")
    train_pairs: int = HfArg(default=HH_TRAIN if GPU else 320, help="Pairs to train on.")
    test_pairs: int = HfArg(default=HH_TEST if GPU else 64, help="Pairs to evaluate.")
    num_prompts: int = HfArg(default=512 if GPU else 16, help="Prompts that both models answer.")
    num_train_epochs: int = HfArg(default=1, help="Epochs of DPO; SFT runs one.")
    max_length: Literal[128, 512] = HfArg(default=128, help="Which of the two recipes.")
    output_dir: str = HfArg(default="runs/speedrun", help="Emptied first.")


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(SpeedrunArguments, DataArguments, argv=argv)
    folder = Path(args.output_dir)
    if folder.exists() and not (folder / MARK).exists():
        raise UserError(f"--output_dir {folder} was not written by a speedrun; pass a different folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    drawn_from = name_data(data)
    tokenizer = load_tokenizer_and_data(data, args.tokenizer_name, args.model, folder / "given")
    save_random_model(args.model, tokenizer, folder / "base")
    splits = load_pairs(data, tokenizer, args.max_length)
    resample_rows(splits["train"].texts, args.train_pairs, folder / "data/train.jsonl")
    resample_rows(splits["test"].texts, args.test_pairs, folder / "data/test.jsonl")

    seconds = run_stages(args, folder)
    results = {
        "model": args.model,
        "max_length": args.max_length,
        "epochs": args.num_train_epochs,
        "pairs": args.train_pairs,
        "test_pairs": args.test_pairs,
        "drawn_from": drawn_from,
        "device": torch.cuda.get_device_name() if GPU else "CPU",
        "torch": torch.__version__,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
    }
    write_json(folder / "speedrun.json", results)
    print(f"{format_table(results)}\nWritten to {folder / 'speedrun.json'}.")


def resample_rows(texts: Dataset, count: int, path: Path) -> None:
    """Write `count` rows drawn with replacement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = texts.select_columns(["prompt", "chosen", "rejected"]).to_list()
    Dataset.from_list(random.Random(0).choices(rows, k=count)).to_json(path)


def run_stages(args: SpeedrunArguments, folder: Path) -> dict[str, float]:
    """Run SFT, DPO and evaluation, and return the seconds of each."""
    sft = ["--model_name_or_path", folder / "base", "--output_dir", folder / "sft"]
    dpo = ["--model_name_or_path", folder / "sft", "--output_dir", folder / "dpo"]
    dpo += ["--num_train_epochs", args.num_train_epochs]
    evaluate = ["--model_name_or_path", folder / "dpo", "--ref_model_name_or_path", folder / "sft"]
    evaluate += ["--output_dir", folder / "evaluation", "--num_prompts", args.num_prompts]
    return {
        "SFT": run_stage("sft", args.max_length, folder / "data", sft),
        "reference pass and DPO": run_stage("dpo", args.max_length, folder / "data", dpo),
        "evaluation": run_stage("evaluate", args.max_length, folder / "data", evaluate),
    }


def run_stage(script: str, max_length: int, data: Path, flags: list[Any]) -> float:
    """Run one of the project's scripts as a user would, and return its seconds."""
    recipe = f"{RECIPE}/{script}.yaml"
    if max_length == 512 and script != "evaluate":  # which takes max_length from the policy's run
        recipe = f"{RECIPE}/{script}-512.yaml"
    command = [sys.executable, f"scripts/{script}.py", "--config", recipe, "--dataset_name", str(data)]
    command += map(str, flags)
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    start = time.monotonic()
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{script}.py ended with an error; its own message stands above")
    return time.monotonic() - start


def format_table(results: dict[str, Any]) -> str:
    """The times as Markdown."""
    full = (results["pairs"], results["test_pairs"]) == (HH_TRAIN, HH_TEST)
    size = "HH's full size" if full else f"{results['pairs']:,} pairs, not HH's full size"
    lines = [
        f"\n{results['model']}, {results['max_length']} tokens, {results['epochs']} DPO epoch(s), "
        f"{results['device']}; {size}, drawn with replacement from {results['drawn_from']} pairs, random weights: "
        "timing only",
        "",
        "| stage | minutes |",
        "| --- | --- |",
        *(f"| {name} | {seconds / 60:.1f} |" for name, seconds in results["seconds"].items()),
        f"| all | {results['total_seconds'] / 60:.1f} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with report_errors():
        main()
