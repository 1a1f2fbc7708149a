"""Compare a policy with its reference on held-out pairs and on answers they sample.

    python scripts/evaluate.py --model_name_or_path runs/<recipe folder>/dpo \
        --ref_model_name_or_path runs/<recipe folder>/sft --dataset_name Anthropic/hh-rlhf \
        --output_dir runs/<recipe folder>/evaluation

Fewer prompts and a reward of your own: add `--num_prompts 64 --reward_funcs my_rewards.politeness`.
"""

import gc
from dataclasses import asdict

from tinydpo.data.asked import readable
from tinydpo.data.pairs import load_split
from tinydpo.engine.logps import pair_logps, token_logps
from tinydpo.errors import one_sentence
from tinydpo.evaluation import explicit, metrics
from tinydpo.evaluation.compared import EvaluateArguments
from tinydpo.evaluation.results import by_row, make_folder, save
from tinydpo.evaluation.rewards import RewardArguments, each_score, load_rewards
from tinydpo.evaluation.sampling import cached_answers, prompts_to_answer
from tinydpo.evaluation.table import side_by_side, table
from tinydpo.launching.arguments import DataArguments
from tinydpo.launching.machine import device_and_dtype
from tinydpo.launching.parsing import parse
from tinydpo.models.loading import load_model
from tinydpo.report.page import write_report
from tinydpo.report.token_colors import pieces


def main(argv: list[str] | None = None) -> None:
    args, reward, data = parse(EvaluateArguments, RewardArguments, DataArguments, argv=argv)
    (device, dtype), rows = device_and_dtype(args.dtype), args.row_length
    functions = load_rewards(reward, device, args.batch_size, dtype)
    tokenizer = args.load_tokenizer()
    output_dir = make_folder(args.output_dir)
    held_out = load_split(data, tokenizer, args.max_length, "test")
    texts, prompts = prompts_to_answer(held_out.texts, tokenizer, args.max_length, args.num_prompts, args.seed)

    # One model in memory at a time, each with a seed of its own: on the same random numbers answers are alike.
    logps, answers, answer_logps = {}, {}, {}
    for i, (role, (name, revision)) in enumerate(args.models.items()):
        model = load_model(name, revision, dtype=dtype, device=device)
        logps[role] = pair_logps(model, held_out.pairs, args.batch_size, f"{role}: pairs", rows)
        answers[role] = cached_answers(
            model, tokenizer, prompts, args.max_length // 2, f"{role}: answers", seed=args.seed + i, **args.sampling
        )
        answer_logps[role] = token_logps(model, prompts, answers["policy"].ids, args.batch_size, f"{role}: KL", rows)
        del model
        gc.collect()

    results = metrics.pair_metrics(**logps, beta=args.beta) | {"trained_share": args.trained_share(held_out.texts)}
    results |= metrics.kl_metrics(*answer_logps.values()) | metrics.length_metrics(**answers)
    written = {role: answers[role].texts(tokenizer) for role in args.models}
    columns = readable(texts, tokenizer) | written | {f"ended_{role}": answers[role].ended for role in args.models}
    if functions:
        each = {role: each_score(functions, texts, written[role], answers[role].ids) for role in args.models}
        scores = {role: rewards.sum(0) for role, rewards in each.items()}
        results |= metrics.reward_metrics(**scores) | explicit.agreement(reward, each)
        results |= metrics.each_reward(reward.names(), **each)
        columns |= {f"reward_{role}": scores[role] for role in args.models}
    columns["token_rewards"] = metrics.token_rewards(answer_logps["policy"], answer_logps["ref"], args.beta)
    columns["pieces"] = [pieces(tokenizer, ids) for ids in answers["policy"].ids]
    pairs = metrics.pair_rewards(**logps, beta=args.beta)
    results |= explicit.beside_implicit(reward, functions, held_out, tokenizer, pairs["margin"])
    results |= metrics.accuracy_by_cut(pairs["margin"], held_out.pairs["whole"][:])
    if "subset" in held_out.pairs.column_names:
        pairs["subset"] = held_out.pairs["subset"][:]
        results |= metrics.accuracy_by_subset(pairs["margin"], pairs["subset"])
    used = {"num_prompts": len(prompts), "dtype": str(dtype).removeprefix("torch.")}
    results["settings"] = asdict(data) | asdict(reward) | asdict(args) | used
    samples, pairs = by_row(columns), by_row(pairs)
    print(table(results) + "\n" + side_by_side(samples[:3]))
    save(output_dir, results, samples=samples, pairs=pairs)
    print(f"Report: {write_report(output_dir.parent)}")


if __name__ == "__main__":
    with one_sentence():
        main()
