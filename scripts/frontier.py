"""Reward against KL for every loss and β, one run each: the DPO paper's Figure 2 for a recipe of your own.

    python scripts/frontier.py --config recipes/quickstart/frontier.yaml --betas 0.1 1

A finished run is never made again: the same command goes on where it was cut short, and more losses, betas or seeds
add to what is there.
"""

import runpy
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

from tinydpo import figures, frontier
from tinydpo.arguments import DataArguments, row_length_for
from tinydpo.errors import UserError, one_sentence
from tinydpo.evaluation import device_and_dtype, make_folder
from tinydpo.frontier import FrontierArguments, Run
from tinydpo.frontier_points import Measure, check_settings, points_of, table
from tinydpo.hub import load_model, load_tokenizer
from tinydpo.pairs import load_split
from tinydpo.parsing import check_yaml, parse
from tinydpo.report import write_report
from tinydpo.rewards import RewardArguments, load_rewards
from tinydpo.runs import write_json
from tinydpo.sampling import prompts_to_answer


def main(argv: list[str] | None = None) -> None:
    args, reward, data = parse(FrontierArguments, RewardArguments, DataArguments, argv=argv)
    check_yaml(args.dpo_config)
    recipe, folder = yaml.safe_load(Path(args.dpo_config).read_text()), make_folder(args.output_dir)
    device, dtype = device_and_dtype("auto")
    if not (functions := load_rewards(reward, device, args.batch_size)):
        raise UserError("a frontier needs a reward: pass --reward_funcs or --reward_model_name_or_path")
    tokenizer, max_length = load_tokenizer(args.model_name_or_path), recipe.get("max_length", 128)
    held_out = load_split(data, tokenizer, max_length, "test").texts
    texts, prompts = prompts_to_answer(held_out, tokenizer, max_length, args.num_prompts, args.sample_seed)
    rows = row_length_for(max_length, None) if recipe.get("shared_prefix", True) else None
    models = load_model(args.model_name_or_path, dtype=dtype, device=device), tokenizer
    common = texts["prompt"][:], prompts, functions, max_length // 2, rows, args.batch_size, args.sample_seed
    measure, runs = Measure(*models, *common), list(frontier.plan(args))

    print(f"{len(runs)} runs into {folder}, after {args.best_of} answers of the reference to {len(prompts)} prompts.")
    check_settings(folder / "frontier.json", settings := frontier.settings_of(args, reward, data, recipe))
    sft, best = measure.reference(args.best_of)
    frontier.write_shuffled(data, folder / "shuffled-data")
    result = {"settings": settings, "reward": reward.name(), "sft": sft, "best_of_n": best, "points": [], "failed": []}
    write_json(folder / "frontier.json", result)

    def train(run: Run) -> None:
        flags = frontier.dpo_flags(run, args, data, folder)
        with open(folder / f"{run.name}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            runpy.run_path(str(Path(__file__).with_name("dpo.py")))["main"](flags)

    took = []
    for number, run in enumerate(runs, 1):
        start = time.monotonic()
        try:
            result["points"] += (points := points_of(run, folder / run.name, train, measure))
            told = f"KL {points[-1]['kl']:.2f} nats, reward {points[-1]['reward']:.2f}"
        except (Exception, SystemExit) as error:  # one run's, whatever it is: the others go on
            result["failed"].append({"name": run.name, "error": str(error) or repr(error)})
            told = f"FAILED: {error}"
        write_json(folder / "frontier.json", result)
        took += [seconds] if (seconds := time.monotonic() - start) > 1 else []  # those made before take no time
        left = sum(took) / max(1, len(took)) * (len(runs) - number) / 60
        print(f"[{number}/{len(runs)}] {run.curve}, β {run.beta:g}: {told}; about {left:.0f} min left", flush=True)
    figures.frontier(result).savefig(folder / "frontier.png", dpi=150)
    print(table(result["points"], sft))
    print(f"Figure: {folder / 'frontier.png'}; report: {write_report(folder.parent)}")
    if failed := result["failed"]:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed, {failed[0]['name']}: {failed[0]['error']}")


if __name__ == "__main__":
    with one_sentence():
        main()
