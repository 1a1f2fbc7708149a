"""Compare a policy with its reference on held-out pairs and on answers they sample.

    python scripts/evaluate.py --model_name_or_path runs/<recipe folder>/dpo \
        --ref_model_name_or_path runs/<recipe folder>/sft --dataset_name Anthropic/hh-rlhf \
        --output_dir runs/<recipe folder>/evaluation

Fewer prompts and a reward of your own: add `--num_prompts 64 --reward_funcs my_rewards.politeness`.
"""

import gc
from dataclasses import asdict

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.data.text import get_readable_columns
from tinydpo.errors import report_errors
from tinydpo.evaluation import metrics
from tinydpo.evaluation import metrics as explicit
from tinydpo.evaluation.arguments import EvaluateArguments
from tinydpo.evaluation.results import columns_to_rows, make_output_folder, save_evaluation
from tinydpo.evaluation.rewards import RewardArguments, load_rewards, score_by_function
from tinydpo.evaluation.sampling import prepare_prompts, sample_cached
from tinydpo.evaluation.table import format_samples, format_table
from tinydpo.models.loading import load_model
from tinydpo.report.page import write_report
from tinydpo.report.tokens import split_into_pieces
from tinydpo.training.logps import pair_logps, token_logps


def main(argv: list[str] | None = None) -> None:
    args, reward, data = parse_args(EvaluateArguments, RewardArguments, DataArguments, argv=argv)
    (device, dtype), rows = pick_device_and_dtype(args.dtype), args.row_length
    functions = load_rewards(reward, device, args.batch_size, dtype)
    tokenizer = args.load_tokenizer()
    output_dir = make_output_folder(args.output_dir)
    held_out = load_split(data, tokenizer, args.max_length, "test")
    texts, prompts = prepare_prompts(held_out.texts, tokenizer, args.max_length, args.num_prompts, args.seed)

    # One model in memory at a time, each with a seed of its own: on the same random numbers answers are alike.
    logps, answers, answer_logps = {}, {}, {}
    for i, (role, (name, revision)) in enumerate(args.models.items()):
        model = load_model(name, revision, dtype=dtype, device=device)
        logps[role] = pair_logps(model, held_out.pairs, args.batch_size, f"{role}: pairs", rows)
        answers[role] = sample_cached(
            model, tokenizer, prompts, args.max_length // 2, f"{role}: answers", seed=args.seed + i, **args.sampling
        )
        answer_logps[role] = token_logps(model, prompts, answers["policy"].ids, args.batch_size, f"{role}: KL", rows)
        del model
        gc.collect()

    results = metrics.pair_metrics(**logps, beta=args.beta)
    results |= metrics.kl_metrics(*answer_logps.values()) | metrics.length_metrics(**answers)
    written = {role: answers[role].texts(tokenizer) for role in args.models}
    columns = (
        get_readable_columns(texts, tokenizer)
        | written
        | {f"ended_{role}": answers[role].ended for role in args.models}
    )
    if functions:
        each = {role: score_by_function(functions, texts, written[role], answers[role].ids) for role in args.models}
        scores = {role: rewards.sum(0) for role, rewards in each.items()}
        results |= metrics.reward_metrics(**scores) | explicit.rank_agreement(reward, each)
        results |= metrics.metrics_by_reward(reward.names(), **each)
        columns |= {f"reward_{role}": scores[role] for role in args.models}
    columns["token_rewards"] = metrics.token_rewards(answer_logps["policy"], answer_logps["ref"], args.beta)
    columns["pieces"] = [split_into_pieces(tokenizer, ids) for ids in answers["policy"].ids]
    pairs = metrics.pair_rewards(**logps, beta=args.beta)
    results |= explicit.compare_with_reward_model(reward, functions, held_out, tokenizer, pairs["margin"])
    results |= metrics.accuracy_by_cut(pairs["margin"], held_out.pairs["whole"][:])
    if "subset" in held_out.pairs.column_names:
        pairs["subset"] = held_out.pairs["subset"][:]
        results |= metrics.accuracy_by_subset(pairs["margin"], pairs["subset"])
    used = {"num_prompts": len(prompts), "dtype": str(dtype).removeprefix("torch.")}
    results["settings"] = asdict(data) | asdict(reward) | asdict(args) | used
    samples, pairs = columns_to_rows(columns), columns_to_rows(pairs)
    print(format_table(results) + "\n" + format_samples(samples[:3]))
    save_evaluation(output_dir, results, samples=samples, pairs=pairs)
    print(f"Report: {write_report(output_dir.parent)}")


if __name__ == "__main__":
    with report_errors():
        main()
