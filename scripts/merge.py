"""Put a LoRA adapter into its base's weights: a plain checkpoint that needs neither peft nor the base's folder.

    python scripts/merge.py --model_name_or_path runs/gpt2-medium-hh/dpo-lora \
        --output_dir runs/gpt2-medium-hh/dpo-lora-merged

`make merge` runs the same. A base that lies elsewhere by now: add `--base_model_name_or_path FOLDER`. The weights are
written in float32.
"""

import os
import shutil
from pathlib import Path

from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.models import loading as adapters
from tinydpo.models.loading import MergeArguments, load_tokenizer
from tinydpo.models.stop_tokens import reset_generation_config


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_args(MergeArguments, argv=argv)
    adapter = adapters.find_adapter(args.model_name_or_path, args.model_revision)
    if adapter is None:
        raise UserError(f"{args.model_name_or_path} is no adapter: there is no {adapters.ADAPTER_CONFIG} in it")
    model, tokenizer = adapters.merge_adapter(adapter, args.base_model_name_or_path), load_tokenizer(str(adapter))

    from tinydpo.files import RUN_CONFIG, read_run_config
    from tinydpo.training.train import FINISHED, SUMMARY

    reset_generation_config(model, tokenizer)
    output, run = Path(args.output_dir), read_run_config(str(adapter))
    half = output.with_name(f".{output.name}.half")  # whole or not at all
    try:
        model.save_pretrained(half)
        tokenizer.save_pretrained(half)
        # Evaluation takes beta and max_length from these, the playground how to ask, training that it is done.
        for name in (RUN_CONFIG, SUMMARY, FINISHED):
            if (adapter / name).is_file():
                shutil.copy(adapter / name, half)
        os.replace(half, output)
    except OSError as error:
        raise UserError(f"--output_dir {output}: {error.strerror or error}; choose another folder") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)
    print(f"Merged: {output} holds the model in float32, as a plain checkpoint.")
    if run.get("load_in_4bit") or run.get("load_in_8bit"):
        print("While it trained, its base was quantized; here it is not, and answers differ by that rounding.")


if __name__ == "__main__":
    with report_errors():
        main()
