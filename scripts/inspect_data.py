"""See what the token budget does to your pairs, before any training.

    python scripts/inspect_data.py --config recipes/gpt2-medium-hh/sft.yaml --max_length 256

`make inspect` runs the same. Pass --dataset_name for your own data, --model_name_or_path for its tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from tinydpo.config.arguments import DataArguments, ReferenceArguments, RunArguments
from tinydpo.config.recipe import parse_args
from tinydpo.errors import report_errors

FEW_PAIRS = 100  # about as many as it takes to distinguish an accuracy of 60 % from chance


@dataclass
class InspectArguments:
    """What to show of the data."""

    model_name_or_path: str | None = HfArg(default=None, help="Model whose tokenizer to use.")
    model_revision: str | None = HfArg(default=None, help="Its commit, tag or branch on the Hub.")
    eos_token: str | None = HfArg(default=None, help="The end token that SFT is given.")
    chat_template_path: str | None = HfArg(default=None, help="The chat template that SFT is given.")
    max_length: int = HfArg(default=128, help="Tokens of prompt and one completion together.")
    examples: int = HfArg(default=3, help="Fitted pairs to show per split.")
    json: str | None = HfArg(default=None, help="Also write the figures to this file.")


def main(argv: list[str] | None = None) -> None:
    from trl import DPOConfig, ModelConfig, SFTConfig

    recipe = (SFTConfig, DPOConfig, ModelConfig, RunArguments, ReferenceArguments)
    look, data = parse_args(InspectArguments, DataArguments, argv=argv, ignored=recipe)
    if look.json:
        Path(look.json).parent.mkdir(parents=True, exist_ok=True)

    from tinydpo.data.inspect import describe_split, measure_split
    from tinydpo.data.notice import CONTENT_NOTICE, is_hh
    from tinydpo.data.pairs import load_pairs
    from tinydpo.files import write_json
    from tinydpo.models.loading import apply_tokenizer_flags, load_tokenizer

    tokenizer = load_tokenizer(look.model_name_or_path, look.model_revision)
    apply_tokenizer_flags(tokenizer, look)
    splits = load_pairs(data, tokenizer, look.max_length, need_pairs=None)
    if is_hh(data.dataset_name):
        print(f"{CONTENT_NOTICE}\n")
    figures = {}
    for name, split in splits.items():
        measures = measure_split(split, tokenizer, look.max_length)
        print(describe_split(name, split, measures, tokenizer, look.max_length, look.examples), end="\n\n")
        figures[name] = split.summary | measures
    held_out = splits["test"].summary["pairs_kept"]
    if held_out < FEW_PAIRS:
        share = min(0.5, FEW_PAIRS / (held_out + splits["train"].summary["pairs_kept"]))
        print(
            f"{held_out} held-out pairs are usually too few to tell an accuracy from chance; if they come from the "
            f"training data, pass --test_split_size {share:.2g} to every stage."
        )
    if look.json:
        write_json(Path(look.json), figures)
        print(f"The figures are in {look.json}.")


if __name__ == "__main__":
    with report_errors():
        main()
