"""The whole method on a task whose true reward is known: SFT, DPO and evaluation on two CPU cores in minutes.

    python scripts/quickstart.py --seed 1 --output_dir runs/quickstart-seed1

`make quickstart` runs the same with seed 0. The stages are the real scripts, their commands are printed, and
`tinydpo/data/toy_task.py` says what the task and its gold reward are.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

from datasets import disable_progress_bars

from tinydpo.errors import report_errors
from tinydpo.toy_task import write_task

RECIPE = "recipes/quickstart"


def stage(script: str, recipe: str, **flags: object) -> None:
    argv = ["--config", f"{RECIPE}/{recipe}.yaml", *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
    print(f"\n$ python scripts/{script}.py {' '.join(argv)}", flush=True)
    importlib.import_module(script).main(argv)


def main() -> None:
    parser = argparse.ArgumentParser(description="SFT, DPO and evaluation on the toy task.", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the data, the models and the samples")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()
    disable_progress_bars()  # on so few rows they only flash by
    runs, seed, start = args.output_dir, args.seed, time.monotonic()
    data, base, sft, dpo = (runs / name for name in ("data", "base", "sft", "dpo"))

    print(f"Writing dialogues to {data} and an untrained GPT-2 to {base} (seed {seed}).")
    write_task(data, base, seed)

    stage("sft", "sft", model_name_or_path=base, dataset_name=data, output_dir=sft, seed=seed)
    stage("dpo", "dpo", model_name_or_path=sft, dataset_name=data, output_dir=dpo, seed=seed)
    of_sft, of_dpo = runs / "evaluation-sft", runs / "evaluation"
    for policy, reference, figures, prompts in ((sft, base, of_sft, 128), (dpo, sft, of_dpo, 512)):
        stage(
            "evaluate", "evaluate", model_name_or_path=policy, ref_model_name_or_path=reference, dataset_name=data,
            output_dir=figures, num_prompts=prompts, seed=seed,
        )  # fmt: skip
    print_table(*(json.loads((folder / "eval_results.json").read_text()) for folder in (of_sft, of_dpo)))
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Models, cards and curves: {sft}, {dpo};")
    print(f"figures and all sampled answers: {of_dpo}; everything on one page: {runs / 'report.html'}.")


def print_table(of_sft: dict, of_dpo: dict) -> None:
    low, high = of_dpo["reward_accuracy_ci95"]
    print("\n                     gold reward   answers that end   tokens an answer")
    for name, figures, role in (("base", of_sft, "ref"), ("SFT", of_dpo, "ref"), ("DPO", of_dpo, "policy")):
        reward, ended, length = (figures[f"{key}_{role}"] for key in ("reward", "ended", "mean_length"))
        print(f"{name:>4}{reward:>28.2f}{ended:>19.0%}{length:>19.1f}")
    print(
        f"\nDPO beats SFT by gold reward on {of_dpo['win_rate_vs_ref']:.1%} of held-out prompts; its implicit reward"
    )
    print(f"prefers the chosen answer in {of_dpo['reward_accuracy']:.1%} of {of_dpo['pairs']} held-out pairs")
    print(f"(95 % interval {low:.1%} to {high:.1%}), {of_dpo['kl_per_sequence']:.1f} nats from SFT.")


if __name__ == "__main__":
    with report_errors():
        main()
