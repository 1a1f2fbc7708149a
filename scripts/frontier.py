"""Reward against KL for every loss and β, one run each: the DPO paper's Figure 2 for a recipe of your own.

    python scripts/frontier.py --config recipes/quickstart/frontier.yaml --betas 0.1 1

A finished run is never made again: the same command goes on where it was cut short, and other losses, betas or seeds
add to those made before.
"""

import gc
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import dpo

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation import frontier
from tinydpo.evaluation.frontier import (
    FrontierArguments,
    FrontierRun,
    check_frontier_settings,
    format_frontier,
    load_measure,
    measure_run,
    order_points,
    read_finished_runs,
)
from tinydpo.evaluation.results import make_output_folder
from tinydpo.evaluation.rewards import RewardArguments
from tinydpo.files import write_json
from tinydpo.report import figures
from tinydpo.report.page import write_report


def main(argv: list[str] | None = None) -> None:
    args, reward, data = parse_args(FrontierArguments, RewardArguments, DataArguments, argv=argv)
    recipe = frontier.load_dpo_recipe(args.dpo_config)
    measure = load_measure(args, reward, data, recipe)
    folder = make_output_folder(args.output_dir)  # now that all that it is measured with is there
    settings = frontier.get_frontier_settings(args, reward, data, recipe) | measure.fingerprint()
    check_frontier_settings(folder / "frontier.json", settings)

    known, failed = read_finished_runs(folder), []
    missing = [run for run in frontier.plan_runs(args) if run.name not in known]
    print(f"{len(missing)} runs to make and {len(known)} made before, in {folder}.", flush=True)
    beside = measure.reference(args.best_of)
    frontier.write_frontier_data(data, recipe, folder)

    def result() -> dict[str, Any]:
        points = {"points": order_points(known), "failed": failed}
        return {"settings": settings, "reward": reward.name(), **beside, **points}

    def train(run: FrontierRun) -> None:
        flags = frontier.get_dpo_flags(run, args, data, folder)
        with open(folder / f"{run.name}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            dpo.main(flags)

    write_json(folder / "frontier.json", result())
    start = time.monotonic()
    for number, run in enumerate(missing, 1):
        try:
            known[run.name] = (points := measure_run(run, folder / run.name, train, measure))
            told = f"KL {points[-1]['kl']:.2f} nats, reward {points[-1]['reward']:.2f}"
        except (Exception, SystemExit) as error:  # one run's, whatever it is: the others go on
            failed.append({"name": run.name, "error": (told := str(error) or repr(error))})
        gc.collect()  # a trainer's model and optimizer hold each other
        write_json(folder / "frontier.json", result())
        left = (time.monotonic() - start) / number * (len(missing) - number) / 60
        print(f"[{number}/{len(missing)}] {run.name}: {told}; about {left:.0f} min left", flush=True)
    if known:
        figures.draw_frontier(result()).savefig(folder / "frontier.png", dpi=150)
        print(format_frontier(order_points(known), beside["sft"]))
        print(f"Figure: {folder / 'frontier.png'}; report: {write_report(folder.parent)}")
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} runs failed, {failed[0]['name']}: {failed[0]['error']}")


if __name__ == "__main__":
    with report_errors():
        main()
