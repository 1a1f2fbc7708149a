"""On-policy rounds: the last policy answers, its answers become pairs, DPO continues from it, and it is evaluated.

    python scripts/round.py --recipe recipes/quickstart --rounds 2

The stages are the other scripts, and their commands are printed. A finished stage is not run again: after an
interruption, run the same command again.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from stages import run_script, train_missing_model

from tinydpo.config.arguments import DataArguments, as_list, get_split_name
from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation.arguments import RoundArguments
from tinydpo.files import check_output_folder, read_json, read_yaml, write_json
from tinydpo.run_folder import RunFolder

# Which rows of a dataset are trained on, and which are held out.
SPLIT_FLAGS = {"dataset_train_split", "dataset_test_split", "test_split_size", "max_train_pairs", "max_test_pairs"}


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args(RoundArguments, argv=argv)
    first = find_first_model(args)
    # By default the recipe's own folder, with the runs and results of other commands.
    folder = check_output_folder(args.output_dir, "round-1", "*/run_config.yaml", "*/*_results.json")
    train_missing_model(first["model_name_or_path"], f"{args.recipe}/pairs.yaml", dataset_name=args.dataset_name)

    # These take seconds to import: only once the flags are known to be right.
    from tinydpo.evaluation.on_policy import add_rounds_to_frontier, collect_rounds, format_rounds
    from tinydpo.report import figures

    prompts = get_data_flags(args, "pairs", first)
    held_out = get_data_flags(args, "evaluate", first)
    round_folders = [folder / f"round-{number}" for number in range(1, args.rounds + 1)]

    start = first
    for round_folder in round_folders:
        pairs = round_folder / "pairs"
        policy = round_folder / "dpo"
        run_stage(args, "sample_pairs", "pairs", **start, **prompts, output_dir=pairs)
        run_stage(args, "dpo", "dpo-on-policy", **start, **as_reference(first), dataset_name=pairs, output_dir=policy)
        if start != first:
            evaluate_policy(args, policy, start, round_folder / "evaluation-before", held_out)
        # Against the first model last: a policy's card keeps its last evaluation.
        evaluate_policy(args, policy, first, round_folder / "evaluation", held_out)
        start = {"model_name_or_path": str(policy)}

    results = collect_rounds(round_folders)
    write_json(folder / "rounds.json", results)
    print(f"\n{format_rounds(results['rounds'])}\nFigures: {folder / 'rounds.json'}")
    if results["reward"]:
        frontier = read_json(folder / "frontier/frontier.json", "points", "reward")
        drawn = add_rounds_to_frontier(frontier, results)
        if "rounds" not in drawn:  # the frontier was measured by another reward
            drawn = add_rounds_to_frontier({}, results)
        figures.draw_frontier(drawn).savefig(folder / "rounds.png", dpi=150)
        print(f"Drawn: {folder / 'rounds.png'}")
    if "rewards" in results["rounds"][0]:
        figures.draw_rewards_over_rounds(results["rounds"]).savefig(folder / "rewards.png", dpi=150)
        print(f"Drawn: {folder / 'rewards.png'}")


def find_first_model(args: RoundArguments) -> dict[str, str]:
    """The model that the first round starts from, as flags; it is the reference of all rounds."""
    for stage in ("pairs", "evaluate"):  # the default, the policy's own data, would be its on-policy pairs
        recipe = read_yaml(f"{args.recipe}/{stage}.yaml")
        if not (args.dataset_name or "dataset_name" in recipe):
            raise UserError(f"{args.recipe}/{stage}.yaml names no dataset; pass --dataset_name")
    if args.model_name_or_path:
        return {"model_name_or_path": args.model_name_or_path}
    recipe = read_yaml(f"{args.recipe}/dpo-on-policy.yaml")
    if not recipe.get("model_name_or_path"):
        raise UserError(f"{args.recipe}/dpo-on-policy.yaml names no model to start from; pass --model_name_or_path")
    return {key: recipe[key] for key in ("model_name_or_path", "model_revision") if recipe.get(key)}


def get_data_flags(args: RoundArguments, stage: str, first: dict[str, str]) -> dict[str, Any]:
    """The flags by which a stage reads the same rows in every round: later policies' own runs name sampled pairs."""
    recipe = read_yaml(f"{args.recipe}/{stage}.yaml")
    flags = {"dataset_name": args.dataset_name} if args.dataset_name else {}
    config = RunFolder.of_model(first["model_name_or_path"]).read_config()
    passed_on = {field.name for field in fields(DataArguments)} - {"dataset_name"}
    if as_list(args.dataset_name or recipe["dataset_name"]) != as_list(config.get("dataset_name")):
        passed_on = SPLIT_FLAGS
        if "dataset_train_split" in config:  # a slice is of the run's own data
            config["dataset_train_split"] = get_split_name(config["dataset_train_split"])
    return flags | {key: value for key, value in config.items() if key in passed_on and key not in recipe}


def as_reference(model: dict[str, str]) -> dict[str, str]:
    return {f"ref_{key}": value for key, value in model.items()}


def evaluate_policy(
    args: RoundArguments, policy: Path, reference: dict[str, str], folder: Path, data: dict[str, Any]
) -> None:
    """Evaluate a policy against a reference, unless the folder has an evaluation newer than policy and recipe."""
    results = folder / "eval_results.json"
    inputs = (RunFolder(policy).results_file, Path(args.recipe) / "evaluate.yaml")
    if results.exists() and results.stat().st_mtime >= max(file.stat().st_mtime for file in inputs):
        print(f"{folder} has this evaluation already.")
        return
    models = {"model_name_or_path": policy, **as_reference(reference)}
    run_stage(args, "evaluate", "evaluate", **models, **data, output_dir=folder)


def run_stage(args: RoundArguments, script: str, recipe: str, **flags: object) -> None:
    argv: list[object] = ["--config", f"{args.recipe}/{recipe}.yaml"]
    for name, value in flags.items():
        if value is not None:
            argv += [f"--{name}", *(value if isinstance(value, list) else [value])]
    run_script(script, *argv, "--seed", args.seed)


if __name__ == "__main__":
    with report_errors():
        main()
