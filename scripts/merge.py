"""Put a LoRA adapter into its base's weights: a plain checkpoint that needs neither peft nor the base's folder.

    python scripts/merge.py --model_name_or_path runs/gpt2-medium-hh/dpo-lora \
        --output_dir runs/gpt2-medium-hh/dpo-lora-merged

`make merge` runs the same. If the base has moved, add `--base_model_name_or_path FOLDER`. The weights are written in
float32.
"""

import os
import shutil
from pathlib import Path

from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.models.loading import ADAPTER_CONFIG, MergeArguments, find_adapter, load_tokenizer, merge_adapter
from tinydpo.models.stop_tokens import reset_generation_config
from tinydpo.run_folder import RunFolder


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args(MergeArguments, argv=argv)
    adapter = find_adapter(args.model_name_or_path, args.model_revision)
    if adapter is None:
        raise UserError(f"{args.model_name_or_path} is no adapter: there is no {ADAPTER_CONFIG} in it")
    model = merge_adapter(adapter, args.base_model_name_or_path)
    tokenizer = load_tokenizer(str(adapter))
    reset_generation_config(model, tokenizer)

    output = Path(args.output_dir)
    unfinished = output.with_name(f".{output.name}.half")  # renamed when all is written
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        # The run's settings and summary: evaluation and playground read them; its results: training asks for them.
        run = RunFolder(adapter)
        for file in (run.config_file, run.summary_file, run.results_file):
            if file.is_file():
                shutil.copy(file, unfinished)
        os.replace(unfinished, output)
    except OSError as error:
        raise UserError(f"--output_dir {output}: {error.strerror or error}; choose another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Merged: {output} holds the model in float32, as a plain checkpoint.")
    settings = RunFolder.of_model(adapter).read_config()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        print("While it trained, its base was quantized; here it is not, and answers differ by that rounding.")


if __name__ == "__main__":
    with report_errors():
        main()
