"""Preference-tune a fine-tuned model with DPO; policy and reference both start from its checkpoint.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/dpo.py \
        --config recipes/gpt2-medium-hh/dpo.yaml --beta 0.3

`make dpo` runs the same, and the SFT before it where that is missing. Every flag of TRL's DPOConfig and ModelConfig
works, here and in the recipe (--help).
"""

from functools import partial

from tinydpo.arguments import DataArguments, RunArguments
from tinydpo.errors import one_sentence
from tinydpo.parsing import parse_resolved
from tinydpo.peers import told_of_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import DPOConfig, ModelConfig

    types = (DataArguments, RunArguments, DPOConfig, ModelConfig)
    (data, run, training, model), resolved = parse_resolved(*types, argv=argv)

    from tinydpo import adapters, runs
    from tinydpo.hub import load_tokenizer
    from tinydpo.launch import prepare
    from tinydpo.pairs import load_pairs
    from tinydpo.shared_prefix import SharedPrefixDPOTrainer
    from tinydpo.trainers import FittedDPOTrainer

    prepare(training, model, run.accelerate_config)
    if runs.is_finished(training.output_dir, resolved):
        return
    source = model.model_name_or_path, model.model_revision
    tokenizer = load_tokenizer(*source, training.trust_remote_code)
    runs.check_model(*source, tokenizer, training.max_length, training.trust_remote_code)
    splits = load_pairs(data, tokenizer, training.max_length)
    evaluate = training.eval_strategy != "no"
    engine = partial(SharedPrefixDPOTrainer, row_length=run.row_length) if run.shared_prefix else FittedDPOTrainer
    trainer = runs.build(
        lambda: engine(
            model=model.model_name_or_path,
            args=training,
            train_dataset=splits["train"].pairs,
            eval_dataset=runs.held_out(splits["test"].pairs, run.eval_pairs) if evaluate else None,
            processing_class=tokenizer,
            **adapters.configs(model),
        ),
        *source,
    )
    runs.train(trainer, resolved, {name: split.summary for name, split in splits.items()})


if __name__ == "__main__":
    with one_sentence(), told_of_lost_peers():
        main()
