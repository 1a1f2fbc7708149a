r"""Let a judge compare a policy's answers with the dataset's and with its reference's; the judge is tested first.

    export JUDGE_API_KEY=…    # a local server needs none
    python scripts/winrate.py --config recipes/<recipe folder>/winrate.yaml \
        --judge_base_url https://host/v1 --judge_model <name>

Several temperatures, as in the DPO paper's Figure 3: add `--temperatures 0.25 0.5 0.75 1.0`.
"""

import gc
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.data.text import get_readable_columns
from tinydpo.errors import report_errors
from tinydpo.evaluation.judge import Judge, JudgeArguments, calibrate_judge
from tinydpo.evaluation.results import add_to_card
from tinydpo.evaluation.sampling import prepare_prompts, sample_cached
from tinydpo.evaluation.winrate import WinrateArguments, cut_answers, format_winrates, summarize_verdicts, winrate_rows
from tinydpo.files import check_output_folder, write_json
from tinydpo.models.loading import load_model
from tinydpo.report.page import check_page, write_report


def main(argv: list[str] | None = None) -> None:
    types = (WinrateArguments, JudgeArguments, DataArguments)
    args, judging, data = parse_args(*types, argv=argv, defaults_from_run="model_name_or_path")
    output_dir = check_output_folder(args.output_dir, "winrate.json", "verdicts.jsonl")
    check_page(output_dir.parent)
    output_dir.mkdir(parents=True, exist_ok=True)
    judge = Judge(judging, output_dir / "verdicts.jsonl")
    device, dtype = pick_device_and_dtype(args.dtype)
    tokenizer = args.load_tokenizer()
    held_out = load_split(data, tokenizer, args.max_length, "test")
    calibration = calibrate_judge(judge, held_out.texts, tokenizer, args.calibration_pairs, args.seed)
    texts, prompts = prepare_prompts(held_out.texts, tokenizer, args.max_length, args.num_prompts, args.seed)
    answers = sample_all_answers(args, texts, tokenizer, prompts, device, dtype)

    readable = get_readable_columns(texts, tokenizer)
    chosen = cut_answers(readable["chosen"], tokenizer, args.max_length // 2)
    comparisons = []
    for temperature in args.temperatures:
        policy = answers["policy", temperature]
        for opponent, others in (("chosen", chosen), ("ref", answers["ref", temperature])):
            desc = f"judge: against {opponent} at {temperature:g}"
            verdicts = judge.compare(readable["prompt"], policy, others, desc)
            figures = summarize_verdicts(verdicts, policy, others)
            comparisons.append({"opponent": opponent, "temperature": temperature, **figures})

    used = {"num_prompts": len(prompts), "dtype": str(dtype).removeprefix("torch.")}
    results = {
        "settings": asdict(data) | asdict(judging) | asdict(args) | used,
        "judge": judging.judge_model,
        "calibration": calibration,
        "comparisons": comparisons,
        "tokens": judge.count_tokens(),
    }
    print(args.describe_reference() + format_winrates(results))
    write_json(output_dir / "winrate.json", results)
    add_to_card(results, "Win rates by a judge", winrate_rows(results))
    print(f"Report: {write_report(output_dir.parent, policy=args.model_name_or_path)}")


def sample_all_answers(
    args: WinrateArguments, texts: Dataset, tokenizer: Any, prompts: list[list[int]], device: str, dtype: torch.dtype
) -> dict[tuple[str, float], list[str]]:
    """The answers of policy and reference, by role and temperature.

    The settings are those of scripts/evaluate.py, so that with as many prompts its cached answers are judged.
    """
    answers = {}
    for index, (role, (name, revision)) in enumerate(args.models.items()):  # one model in memory at a time
        model = load_model(name, revision, dtype=dtype, device=device)
        for temperature in args.temperatures:
            settings = {"temperature": temperature, "batch_size": args.batch_size, "seed": args.seed + index}
            sampled = sample_cached(model, tokenizer, prompts, args.max_length // 2, f"{role}: answers", **settings)
            answers[role, temperature] = sampled.decode(texts, tokenizer)
        del model
        gc.collect()
    return answers


if __name__ == "__main__":
    with report_errors():
        main()
