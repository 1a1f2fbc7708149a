r"""Compare a policy with its reference on held-out pairs and on answers they sample.

    python scripts/evaluate.py --model_name_or_path runs/<recipe folder>/dpo \
        --output_dir runs/<recipe folder>/evaluation

Reference, data, max_length and β are those of the policy's run unless a flag or the recipe says otherwise. A model
without a run needs `--ref_model_name_or_path` and `--dataset_name`.

Fewer prompts, your own reward: add `--num_prompts 64 --reward_funcs my_rewards.politeness`.
"""

import gc
from dataclasses import asdict

import numpy as np
import torch
from datasets import Dataset
from stages import suggest_command
from transformers import PreTrainedTokenizerBase

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.data.text import get_readable_columns
from tinydpo.errors import report_errors
from tinydpo.evaluation import metrics
from tinydpo.evaluation.arguments import EvaluateArguments, RewardArguments
from tinydpo.evaluation.results import save_evaluation
from tinydpo.evaluation.rewards import load_rewards, score_answers, score_pairs
from tinydpo.evaluation.sampling import Answers, prepare_prompts, sample_cached
from tinydpo.evaluation.table import format_samples, format_table, summarize_results
from tinydpo.files import check_output_folder
from tinydpo.models.loading import load_model
from tinydpo.report.page import check_page, write_report
from tinydpo.report.tokens import split_into_pieces
from tinydpo.training.logps import PairLogps, pair_logps, token_logps


def main(argv: list[str] | None = None) -> None:
    types = (EvaluateArguments, RewardArguments, DataArguments)
    args, reward, data = parse_args(*types, argv=argv, defaults_from_run="model_name_or_path")
    output_dir = check_output_folder(args.output_dir, "eval_results.json", "samples.jsonl")
    check_page(output_dir.parent)
    device, dtype = pick_device_and_dtype(args.dtype)
    functions = load_rewards(reward, device, args.batch_size, dtype)
    tokenizer = args.load_tokenizer()
    held_out = load_split(data, tokenizer, args.max_length, "test")
    texts, prompts = prepare_prompts(held_out.texts, tokenizer, args.max_length, args.num_prompts, args.seed)

    logps, answers, answer_logps = run_models(args, tokenizer, held_out.pairs, prompts, device, dtype)

    # Figures of the held-out pairs, and the rows of pairs.jsonl
    results = metrics.pair_metrics(**logps, beta=args.beta)
    pairs = metrics.pair_rewards(**logps, beta=args.beta)
    results |= metrics.accuracy_by_cut(pairs["margin"], held_out.pairs["whole"][:])
    if "subset" in held_out.pairs.column_names:
        pairs["subset"] = held_out.pairs["subset"][:]
        results |= metrics.accuracy_by_subset(pairs["margin"], pairs["subset"])
    if reward.reward_model_name_or_path:
        chosen, rejected = score_pairs(functions[-1], held_out, tokenizer)
        results |= metrics.compare_with_reward_model(pairs["margin"], chosen - rejected, pairs.get("subset"))

    # Figures of the sampled answers, and the rows of samples.jsonl
    results |= metrics.kl_metrics(answer_logps["policy"], answer_logps["ref"])
    results |= metrics.length_metrics(**answers)
    samples = get_readable_columns(texts, tokenizer)
    for role in args.models:
        samples[role] = answers[role].decode(texts, tokenizer)
        samples[f"ended_{role}"] = answers[role].ended
    if functions:
        scores = {role: score_answers(functions, texts, samples[role], answers[role].ids) for role in args.models}
        results |= metrics.compare_rewards(reward.names(), **scores)
        if reward.reward_funcs and reward.reward_model_name_or_path:
            results |= metrics.rank_agreement(**scores)
        samples |= {f"reward_{role}": scores[role].sum(0) for role in args.models}
    samples["token_rewards"] = metrics.token_rewards(answer_logps["policy"], answer_logps["ref"], args.beta)
    samples["pieces"] = [split_into_pieces(tokenizer, ids) for ids in answers["policy"].ids]

    used = {"num_prompts": len(prompts), "dtype": str(dtype).removeprefix("torch.")}
    results["settings"] = asdict(data) | asdict(reward) | asdict(args) | used
    samples = Dataset.from_dict(samples).to_list()
    print(args.describe_reference() + format_table(results) + format_samples(samples[: args.show_samples]))
    save_evaluation(output_dir, results, samples=samples, pairs=Dataset.from_dict(pairs).to_list())
    print(f"\n{summarize_results(results)}\nReport: {write_report(output_dir.parent, output_dir)}")
    models = (args.model_name_or_path, args.ref_model_name_or_path)
    print(f"Next, talk to it: {suggest_command('playground', *models)}")


def run_models(
    args: EvaluateArguments,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    prompts: list[list[int]],
    device: str,
    dtype: torch.dtype,
) -> tuple[dict[str, PairLogps], dict[str, Answers], dict[str, list[np.ndarray]]]:
    """For policy and reference: log-probs of the pairs, answers to the prompts, log-probs of the policy's answers."""
    logps = {}
    answers = {}
    answer_logps = {}
    for index, (role, (name, revision)) in enumerate(args.models.items()):
        model = load_model(name, revision, dtype=dtype, device=device)
        logps[role] = pair_logps(model, pairs, args.batch_size, f"{role}: pairs", args.row_length)
        seed = args.seed + index  # with the same random numbers both models' answers would be alike
        answers[role] = sample_cached(
            model, tokenizer, prompts, args.max_length // 2, f"{role}: answers", seed=seed, **args.sampling
        )
        answer_logps[role] = token_logps(
            model, prompts, answers["policy"].ids, args.batch_size, f"{role}: KL", args.row_length
        )
        del model  # one model in memory at a time
        gc.collect()
    return logps, answers, answer_logps


if __name__ == "__main__":
    with report_errors():
        main()
