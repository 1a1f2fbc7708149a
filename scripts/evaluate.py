"""Compare a policy with its reference on held-out pairs and on answers they sample.

    python scripts/evaluate.py --model_name_or_path runs/<recipe folder>/dpo \
        --ref_model_name_or_path runs/<recipe folder>/sft --dataset_name Anthropic/hh-rlhf \
        --output_dir runs/<recipe folder>/evaluation

Fewer prompts and a reward of your own: add `--num_prompts 64 --reward_funcs my_rewards.politeness`.
"""

import gc
from dataclasses import asdict
from pathlib import Path

from tinydpo import evaluation, evaluation_table, metrics
from tinydpo.arguments import DataArguments
from tinydpo.errors import UserError, one_sentence
from tinydpo.evaluation import EvaluateArguments
from tinydpo.fitting import bos_of, tokenize_prompts
from tinydpo.hub import load_model, load_tokenizer
from tinydpo.logps import pair_logps, token_logps
from tinydpo.pairs import load_split
from tinydpo.parsing import parse
from tinydpo.sampling import choose_prompts, cut_prompt, sample_answers


def main(argv: list[str] | None = None) -> None:
    args, data = parse(EvaluateArguments, DataArguments, argv=argv)
    functions = [evaluation.load_reward(name) for name in args.reward_funcs or []]
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision)
    evaluation.check_same_vocabulary(tokenizer, load_tokenizer(args.ref_model_name_or_path, args.ref_model_revision))
    try:
        (output_dir := Path(args.output_dir)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: {error.strerror}; choose another folder") from None

    held_out = load_split(data, tokenizer, args.max_length, "test")
    texts = choose_prompts(held_out.texts, args.num_prompts, args.seed)
    room = args.max_length // 2
    whole, _ = tokenize_prompts(texts, tokenizer)
    bos = next(iter(bos_of(tokenizer)), None)  # as fitting keeps it, not every token that a tokenizer calls so
    prompts = [cut_prompt(ids, args.max_length - room, bos) for ids in whole]

    # One model in memory at a time. Each samples under a seed of its own: with shared random numbers the two answers
    # to a prompt would be alike, and the win rate would not be that of independent answers.
    (device, dtype), rows = evaluation.device_and_dtype(args.dtype), args.row_length
    models = {
        "policy": (args.model_name_or_path, args.model_revision),
        "ref": (args.ref_model_name_or_path, args.ref_model_revision),
    }
    logps, answers, answer_logps = {}, {}, {}
    for index, (role, (name, revision)) in enumerate(models.items()):
        model = load_model(name, revision, dtype=dtype, device=device)
        logps[role] = pair_logps(model, held_out.pairs, args.batch_size, f"{role}: pairs", rows)
        answers[role] = sample_answers(
            model, tokenizer, prompts, room, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            batch_size=args.batch_size, seed=args.seed + index, desc=f"{role}: answers",
        )  # fmt: skip
        answer_logps[role] = token_logps(model, prompts, answers["policy"].ids, args.batch_size, f"{role}: KL", rows)
        del model
        gc.collect()

    results = metrics.pair_metrics(logps["policy"], logps["ref"], args.beta)
    results |= metrics.kl_metrics(answer_logps["policy"], answer_logps["ref"])
    results |= metrics.length_metrics(answers["policy"], answers["ref"])
    written = {role: tokenizer.batch_decode(answers[role].ids, skip_special_tokens=True) for role in models}
    columns = {"prompt": texts["prompt"][:], **written, **{f"ended_{role}": answers[role].ended for role in models}}
    if functions:
        scores = {role: evaluation.rewards(functions, columns["prompt"], written[role]) for role in models}
        results |= metrics.reward_metrics(scores["policy"], scores["ref"])
        columns |= {f"reward_{role}": scores[role].tolist() for role in models}
    results["settings"] = {**asdict(args), "num_prompts": len(prompts), "dtype": str(dtype).removeprefix("torch.")}

    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    print(evaluation_table.table(results) + "\n" + evaluation_table.side_by_side(samples[:3]))
    evaluation.save(output_dir, results, samples)


if __name__ == "__main__":
    with one_sentence():
        main()
