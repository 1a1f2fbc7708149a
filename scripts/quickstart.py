"""The whole method on a task whose true reward is known: SFT, DPO and evaluation on two CPU cores in minutes.

    python scripts/quickstart.py --seed 1 --output_dir runs/quickstart-seed1

`make quickstart` runs the same with seed 0. The stages are the real scripts, and their commands are printed;
tinydpo/toy_task.py says what the task and its gold reward are.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from stages import run_script

from tinydpo.errors import UserError, report_errors
from tinydpo.files import check_output_folder, read_json
from tinydpo.run_folder import RunFolder

RECIPE = os.path.relpath(Path(__file__).parent.parent / "recipes/quickstart")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SFT, DPO and evaluation on the toy task.", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the data, the models and the samples.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="Folder for all of it.")
    args = parser.parse_args(argv)

    # These take seconds to import: only once the flags are known to be right.
    from datasets import disable_progress_bars

    from tinydpo.toy_task import write_task

    disable_progress_bars()  # with so few rows they only flash by
    start = time.monotonic()
    runs = check_output_folder(args.output_dir.expanduser(), "base")
    for stage in ("sft", "dpo"):
        before = RunFolder(runs / stage).read_config().get("seed", args.seed)
        if before != args.seed:  # its data would be replaced under its models
            raise UserError(f"{runs} holds a run of seed {before}; choose another --output_dir, or delete the folder")
    (runs / "base").mkdir(parents=True, exist_ok=True)  # first, so that an interrupted run is known again
    common = ["--dataset_name", runs / "data", "--seed", args.seed]

    print(f"Writing dialogues to {runs / 'data'} and an untrained GPT-2 to {runs / 'base'} (seed {args.seed}).")
    write_task(runs / "data", runs / "base", args.seed)
    run_script(
        "sft", "--config", f"{RECIPE}/sft.yaml", "--model_name_or_path", runs / "base",
        "--output_dir", runs / "sft", *common,
    )  # fmt: skip
    run_script(
        "dpo", "--config", f"{RECIPE}/dpo.yaml", "--model_name_or_path", runs / "sft",
        "--output_dir", runs / "dpo", *common,
    )  # fmt: skip
    run_script(
        "evaluate", "--config", f"{RECIPE}/evaluate.yaml", "--model_name_or_path", runs / "sft",
        "--ref_model_name_or_path", runs / "base", "--output_dir", runs / "evaluation-sft", "--num_prompts", 128,
        "--show_samples", 0,
        *common,
    )  # fmt: skip
    run_script(
        "evaluate", "--config", f"{RECIPE}/evaluate.yaml", "--model_name_or_path", runs / "dpo",
        "--ref_model_name_or_path", runs / "sft", "--output_dir", runs / "evaluation", "--num_prompts", 512,
        *common,
    )  # fmt: skip
    print_table(
        sft=read_json(runs / "evaluation-sft/eval_results.json"),
        dpo=read_json(runs / "evaluation/eval_results.json"),
    )
    minutes = (time.monotonic() - start) / 60
    print(f"\nDone in {minutes:.1f} minutes. Models, cards and curves: {runs / 'sft'}, {runs / 'dpo'};")
    print(f"figures and all sampled answers: {runs / 'evaluation'}; everything on one page: {runs / 'report.html'}.")


def print_table(sft: dict[str, Any], dpo: dict[str, Any]) -> None:
    """Print what two evaluations measured: of the SFT model against its base, of DPO against the SFT model."""
    print("\n                     gold reward   answers that end   tokens per answer")
    for name, results, role in (("base", sft, "ref"), ("SFT", dpo, "ref"), ("DPO", dpo, "policy")):
        reward, ended, length = (results[f"{metric}_{role}"] for metric in ("reward", "ended", "mean_length"))
        print(f"{name:>4}{reward:>28.2f}{ended:>19.0%}{length:>19.1f}")
    low, high = dpo["reward_accuracy_ci95"]
    print(f"\nDPO beats SFT by gold reward on {dpo['win_rate_vs_ref']:.1%} of held-out prompts; its implicit reward")
    print(f"prefers the chosen answer in {dpo['reward_accuracy']:.1%} of {dpo['pairs']} held-out pairs")
    print(f"(95 % interval {low:.1%} to {high:.1%}), {dpo['kl_per_sequence']:.1f} nats from SFT.")


if __name__ == "__main__":
    with report_errors():
        main()
