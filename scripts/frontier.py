"""Reward against KL for every loss and β, one run each: the DPO paper's Figure 2 for a recipe of your own.

    python scripts/frontier.py --config recipes/quickstart/frontier.yaml --betas 0.1 1

A finished run is never trained again: rerun the command after an interruption, or add losses, betas or seeds.
"""

import gc
import time
from contextlib import redirect_stderr, redirect_stdout

import dpo
from stages import train_missing_model

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import get_dtype, pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation import frontier
from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.results import check_settings
from tinydpo.evaluation.rewards import load_rewards
from tinydpo.files import check_output_folder, write_json
from tinydpo.models.loading import load_model
from tinydpo.report.figures import draw_frontier
from tinydpo.report.page import check_page, write_report


def main(argv: list[str] | None = None) -> None:
    types = (frontier.FrontierArguments, RewardArguments, DataArguments)
    args, reward, data = parse_args(*types, argv=argv, defaults_from_run="model_name_or_path")
    folder = check_output_folder(args.output_dir, "frontier.json", "*/run_config.yaml")
    check_page(folder.parent)
    recipe = frontier.load_dpo_recipe(args.dpo_config)
    device, dtype = pick_device_and_dtype(get_dtype(recipe))  # as the runs compute
    functions = load_rewards(reward, device, args.batch_size, dtype, required=True)
    if train_missing_model(args.model_name_or_path, args.dpo_config, dataset_name=data.dataset_name):
        args, reward, data = parse_args(*types, argv=argv, defaults_from_run="model_name_or_path")
    reference = load_model(args.model_name_or_path, dtype=dtype, device=device)
    measure = frontier.FrontierMeasure(args, data, recipe, functions, reference)

    settings = frontier.get_frontier_settings(args, reward, data, recipe) | measure.get_fingerprint()
    check_settings(folder / "frontier.json", settings)
    measured = frontier.read_finished_runs(folder)
    missing = [run for run in frontier.plan_runs(args) if run.name not in measured]
    names = f" ({', '.join(run.name for run in missing)})" if missing else ""
    print(f"{len(missing)} runs to train{names}, {len(measured)} already done; logs: {folder}/*.log", flush=True)
    baselines = measure.measure_reference(args.best_of)

    failed: list[dict[str, str]] = []
    results = {"settings": settings, "reward": reward.name(), **baselines}
    results |= {"points": frontier.order_points(measured), "failed": failed}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "frontier.json", results)
    frontier.write_shuffled_data(data, folder / "shuffled-data")
    start = time.monotonic()
    for number, run in enumerate(missing, 1):
        try:
            run_recipe = frontier.write_run_recipe(run, args, data, recipe, folder)
            with (
                open(folder / f"{run.name}.log", "w", encoding="utf-8") as log,
                redirect_stdout(log),
                redirect_stderr(log),
            ):
                dpo.main(["--config", str(run_recipe)])
            points = frontier.measure_run(run, folder / run.name, measure)
            measured[run.name] = points
            outcome = f"KL {points[-1]['kl']:.2f} nats, reward {points[-1]['reward']:.2f}"
        except (Exception, SystemExit) as error:  # whatever is wrong with one run, the others continue
            outcome = str(error) or repr(error)
            failed.append({"name": run.name, "error": outcome})
        gc.collect()  # a trainer's model and optimizer refer to each other
        results["points"] = frontier.order_points(measured)
        write_json(folder / "frontier.json", results)
        minutes_left = (time.monotonic() - start) / number * (len(missing) - number) / 60
        print(f"[{number}/{len(missing)}] {run.name}: {outcome}; about {minutes_left:.0f} min left", flush=True)

    if measured:
        draw_frontier(results).savefig(folder / "frontier.png", dpi=150)
        print(frontier.format_frontier(results["points"], baselines["sft"]))
        print(f"Figure: {folder / 'frontier.png'}; report: {write_report(folder.parent)}")
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} runs failed, {failed[0]['name']}: {failed[0]['error']}")


if __name__ == "__main__":
    with report_errors():
        main()
