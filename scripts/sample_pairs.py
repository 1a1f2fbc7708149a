"""Let a policy answer the prompts of the train split, score its answers, and pair the better with the worse.

    python scripts/sample_pairs.py --config recipes/quickstart/pairs.yaml --samples_per_prompt 16

`make pairs` runs the same, and the SFT before it where that is missing. What it writes is what `--dataset_name` takes
(docs/on-policy.md). Cut short, the same command goes on.
"""

import io
import json

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation import on_policy
from tinydpo.evaluation.results import make_output_folder
from tinydpo.evaluation.rewards import RewardArguments, load_rewards
from tinydpo.evaluation.sampling import prepare_prompts
from tinydpo.files import write_atomic, write_json
from tinydpo.models.loading import load_model, load_tokenizer
from tinydpo.report import figures


def main(argv: list[str] | None = None) -> None:
    args, reward, data = parse_args(on_policy.PairsArguments, RewardArguments, DataArguments, argv=argv)
    device, dtype = pick_device_and_dtype(args.dtype)
    folder, settings = make_output_folder(args.output_dir), on_policy.get_pairs_settings(args, reward, data)
    if on_policy.has_finished_pairs(folder, settings):
        return
    if not (functions := load_rewards(reward, device, args.batch_size, dtype)):
        raise UserError("pairs need a reward: pass --reward_funcs or --reward_model_name_or_path")
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision)
    texts = load_split(data, tokenizer, args.max_length, "train").texts
    texts, prompts = prepare_prompts(texts, tokenizer, args.max_length, args.num_prompts, args.seed)
    model = load_model(args.model_name_or_path, args.model_revision, dtype=dtype, device=device)
    answers = on_policy.score_samples(
        functions, texts, on_policy.sample_several(model, tokenizer, prompts, args), tokenizer
    )

    rows = on_policy.make_rows(texts, answers, args.pair_by, data.test_split_size)
    counts = on_policy.count_answers(answers, rows, args.pair_by)
    for split, pairs in rows.items():
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        write_atomic(folder / f"{split}.jsonl", "".join(lines))
    both = [*rows["train"], *rows["test"]]
    columns = ([row[name] for row in both] for name in ("reward_chosen", "reward_rejected"))
    every = [answer.reward for scored in answers for answer in scored]
    figures.draw_reward_histogram(every, *columns, reward.name()).savefig(png := io.BytesIO(), format="png", dpi=150)
    write_atomic(folder / "rewards.png", png.getvalue())
    write_atomic(folder / "README.md", on_policy.render_pairs_card(folder, settings, reward, counts))
    write_json(folder / on_policy.PAIRS_RESULTS, {"settings": settings, "counts": counts})
    print("\n".join(f"{name.replace('_', ' '):<28}{value:>10,.6g}" for name, value in counts.items()))
    print(f"Done: {folder} holds train.jsonl, test.jsonl, their card (README.md) and rewards.png.")


if __name__ == "__main__":
    with report_errors():
        main()
