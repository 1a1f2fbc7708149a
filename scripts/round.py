"""On-policy rounds: the last policy answers, its answers become pairs, DPO goes on from it, and it is measured.

    python scripts/round.py --recipe recipes/quickstart --rounds 2

`make round` runs the same, and the SFT before it where that is missing. The stages are the real scripts, their
commands are printed; what is made is not made again, so that the same command goes on wherever it was cut short.
"""

import gc
import importlib

from tinydpo.config.recipe import parse_args
from tinydpo.errors import report_errors
from tinydpo.evaluation import on_policy as rounds
from tinydpo.evaluation.results import make_output_folder
from tinydpo.files import read_json, write_json
from tinydpo.report import figures


def stage(script: str, argv: list[str]) -> None:
    print(f"\n$ python scripts/{script}.py {' '.join(argv)}", flush=True)
    importlib.import_module(script).main(argv)
    gc.collect()  # a trainer's model and optimizer hold each other


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args(rounds.RoundArguments, argv=argv)
    plan, folder = rounds.plan_rounds(args), make_output_folder(args.output_dir)
    for one in plan:
        stage("sample_pairs", one.pairs_flags())
        stage("dpo", one.dpo_flags())
        for made, flags in one.evaluations().items():
            if not one.is_evaluated(made):
                stage("evaluate", flags)
    made = rounds.collect_rounds(plan)
    write_json(folder / "rounds.json", made)
    told = f"Figures: {folder / 'rounds.json'}"
    if made["reward"]:
        known = read_json(folder / "frontier/frontier.json", "points", "reward")
        figures.draw_frontier(rounds.add_rounds_to_frontier(known, made)).savefig(folder / "rounds.png", dpi=150)
        told += f", drawn: {folder / 'rounds.png'}"
    if "rewards" in made["rounds"][0]:
        figures.draw_rewards_over_rounds(made["rounds"]).savefig(folder / "rewards.png", dpi=150)
        told += f" and {folder / 'rewards.png'}"
    print(f"\n{rounds.format_rounds(made['rounds'])}\n{told}")


if __name__ == "__main__":
    with report_errors():
        main()
