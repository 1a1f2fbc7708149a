r"""Put a LoRA adapter into its base's weights: a plain checkpoint that needs neither peft nor the base's folder.

    python scripts/merge.py --model_name_or_path runs/gpt2-medium-hh/dpo-lora \
        --output_dir runs/gpt2-medium-hh/dpo-lora-merged

`make merge` runs the same. If the base has moved, add `--base_model_name_or_path FOLDER`. The weights are written in
float32.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.hf_argparser import HfArg

from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.files import check_output_folder, public_name, write_json
from tinydpo.models.loading import ADAPTER_CONFIG, find_adapter, load_tokenizer, merge_adapter
from tinydpo.models.stop_tokens import reset_generation_config
from tinydpo.run_folder import RunFolder


@dataclass
class MergeArguments:
    """Which adapter, and where the plain checkpoint goes."""

    model_name_or_path: str | None = HfArg(default=None, help="The adapter: folder or Hub id.")
    model_revision: str | None = HfArg(default=None, help="Commit, tag or branch, on the Hub.")
    base_model_name_or_path: str | None = HfArg(
        default=None, help="Its base, in full precision; by default the one that the adapter names."
    )
    output_dir: str | None = HfArg(default=None, help="A new or empty folder for the checkpoint.")

    def __post_init__(self):
        if not self.model_name_or_path or not self.output_dir:
            raise ValueError("pass --model_name_or_path, an adapter, and --output_dir, a new folder")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args(MergeArguments, argv=argv)
    if any(Path(args.output_dir).glob("*.safetensors")):
        raise UserError(f"{args.output_dir} holds a model already; delete the folder to merge again")
    output = check_output_folder(args.output_dir)
    adapter = find_adapter(args.model_name_or_path, args.model_revision)
    if adapter is None:
        raise UserError(f"{args.model_name_or_path} is not an adapter: it has no {ADAPTER_CONFIG}")
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision)
    model = merge_adapter(adapter, args.base_model_name_or_path)
    reset_generation_config(model, tokenizer)

    unfinished = output.with_name(f".{output.name}.half")  # renamed when all is written
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        # The settings and the summary are for evaluation and playground, the rest belongs to the card.
        run = RunFolder.of_model(adapter)
        for file in (run.config_file, run.summary_file, run.environment_file, run.curves_file):
            if file.is_file():
                shutil.copy(file, unfinished)
        if run.is_started:  # what marks the model as whole; a checkpoint has no results of its own
            write_json(RunFolder(unfinished).results_file, RunFolder(adapter).read_results())
        if run.card_file.is_file():
            card = ModelCard.load(run.card_file)
            card.data.library_name = "transformers"
            card.text = card.text.replace(public_name(str(run.path)), public_name(str(output)))
            card.save(unfinished / run.card_file.name)
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Merged: {output} holds the model in float32, as a plain checkpoint.")
    settings = RunFolder.of_model(adapter).read_config()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        print("The base was quantized in training and is in full precision here: answers differ by that rounding.")


if __name__ == "__main__":
    with report_errors():
        main()
