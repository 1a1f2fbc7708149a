"""How much CPU time a batch of pairs costs before the model sees it: fetched from disk, packed and collated.

    python benchmarks/collate.py
    python benchmarks/collate.py --dataset_name my_pairs.jsonl --tokenizer_name openai-community/gpt2 --pairs 64

At 30 % of an H100's peak a step of GPT-2 Medium on 64 pairs lasts 78 ms: what the loader costs must stay far below.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from models import load_tokenizer_and_data
from transformers.hf_argparser import HfArg

from tinydpo.config.arguments import DataArguments, resolve_row_length
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import report_errors


@dataclass
class CollateArguments:
    """What to measure."""

    tokenizer_name: str | None = HfArg(default=None, help="Folder or Hub id; by default the toy task's.")
    max_length: int = HfArg(default=128, help="Tokens of prompt and one completion.")
    pairs: int = HfArg(default=64, help="Pairs in a batch.")
    batches: int = HfArg(default=30, help="Batches, of which the median is printed.")


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(CollateArguments, DataArguments, argv=argv)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer_and_data(data, args.tokenizer_name, "gpt2-tiny", Path(folder))
        pairs = load_split(data, tokenizer, args.max_length, "train").pairs
    # These take seconds to import.
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from tinydpo.training.trainers import PackedPreferenceCollator

    row_length = resolve_row_length(args.max_length, None)
    packed = PackedPreferenceCollator(pad_token_id=tokenizer.eos_token_id, row_length=row_length)
    padded = DataCollatorForPreference(pad_token_id=tokenizer.eos_token_id)
    pairs = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    order = pairs.shuffle(seed=0)  # as in training
    milliseconds: tuple[list[float], list[float]] = ([], [])
    for batch in range(args.batches + 1):
        indices = [(batch * args.pairs + i) % len(order) for i in range(args.pairs)]
        for collator, times in zip((packed, padded), milliseconds, strict=True):
            start = time.process_time()  # of all threads
            collator(order.__getitems__(indices))  # as PyTorch's loader calls it
            times.append(1000 * (time.process_time() - start))
    own, trl = (statistics.median(times[1:]) for times in milliseconds)  # the first one warms up
    print(f"{own:.1f} ms (TRL's collator: {trl:.1f} ms)")


if __name__ == "__main__":
    with report_errors():
        main()
