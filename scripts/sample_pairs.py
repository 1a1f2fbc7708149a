"""Let a policy answer the prompts of the train split, score its answers, and pair the better with the worse.

    python scripts/sample_pairs.py --config recipes/quickstart/pairs.yaml --samples_per_prompt 16

`--dataset_name` reads what it writes (docs/on-policy.md). After an interruption, run the same command again.
"""

from stages import get_config_path, train_missing_model

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import report_errors
from tinydpo.evaluation import on_policy
from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.results import check_settings, write_jsonl
from tinydpo.evaluation.rewards import load_rewards
from tinydpo.evaluation.sampling import prepare_prompts
from tinydpo.files import check_output_folder, write_atomic, write_json
from tinydpo.models.loading import check_model, load_model, load_tokenizer
from tinydpo.report.figures import draw_reward_histogram


def main(argv: list[str] | None = None) -> None:
    types = (on_policy.PairsArguments, RewardArguments, DataArguments)
    args, reward, data = parse_args(*types, argv=argv, defaults_from_run="model_name_or_path")
    folder = check_output_folder(args.output_dir, "rewards.png")  # the first file that it writes
    if train_missing_model(args.model_name_or_path, get_config_path(argv), dataset_name=data.dataset_name):
        args, reward, data = parse_args(*types, argv=argv, defaults_from_run="model_name_or_path")
    settings = on_policy.get_pairs_settings(args, reward, data)
    check_settings(folder / on_policy.PAIRS_RESULTS, settings)
    if (folder / on_policy.PAIRS_RESULTS).exists():
        print(f"{folder} has these pairs already; delete the folder to make them again.")
        return
    device, dtype = pick_device_and_dtype(args.dtype)
    functions = load_rewards(reward, device, args.batch_size, dtype, required=True)

    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision)
    check_model(args.model_name_or_path, args.model_revision, tokenizer, args.max_length)
    train_texts = load_split(data, tokenizer, args.max_length, "train").texts
    texts, prompts = prepare_prompts(train_texts, tokenizer, args.max_length, args.num_prompts, args.seed)
    model = load_model(args.model_name_or_path, args.model_revision, dtype=dtype, device=device)
    samples = on_policy.sample_several(model, tokenizer, prompts, args)
    answers = on_policy.score_samples(functions, texts, samples, tokenizer)
    rows = on_policy.make_rows(texts, answers, args.pair_by, args.held_out_prompts)
    counts = on_policy.count_answers(answers, rows, args.pair_by)

    folder.mkdir(parents=True, exist_ok=True)
    pairs = [*rows["train"], *rows["test"]]
    draw_reward_histogram(
        [answer.reward for scored in answers for answer in scored],
        [pair["reward_chosen"] for pair in pairs],
        [pair["reward_rejected"] for pair in pairs],
        reward.name(),
    ).savefig(folder / "rewards.png", dpi=150)
    for split, pairs in rows.items():
        write_jsonl(folder / f"{split}.jsonl", pairs)
    write_atomic(folder / "README.md", on_policy.render_pairs_card(folder, settings, reward, counts))
    write_json(folder / on_policy.PAIRS_RESULTS, {"settings": settings, "counts": counts})
    for name, value in counts.items():
        print(f"{name.replace('_', ' '):<28}{value:>10,.6g}")
    print(f"Done: {folder} has train.jsonl, test.jsonl, their card (README.md) and rewards.png.")


if __name__ == "__main__":
    with report_errors():
        main()
