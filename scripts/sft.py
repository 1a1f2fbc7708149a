"""Fine-tune a model on the preferred answers: the reference model that DPO starts from.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/sft.py \
        --config recipes/gpt2-medium-hh/sft.yaml --learning_rate 2e-5

`make sft` runs the same. Every flag of TRL's SFTConfig and ModelConfig works, here and in the recipe (--help).
"""

from functools import partial

from tinydpo.arguments import DataArguments, RunArguments
from tinydpo.errors import one_sentence
from tinydpo.parsing import parse_resolved
from tinydpo.peers import told_of_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, SFTConfig

    types = (DataArguments, RunArguments, SFTConfig, ModelConfig)
    (data, run, training, model), resolved = parse_resolved(*types, argv=argv)

    from tinydpo import adapters, runs
    from tinydpo.hub import load_tokenizer
    from tinydpo.launch import prepare
    from tinydpo.pairs import load_pairs
    from tinydpo.shared_prefix import PackedSFTTrainer
    from tinydpo.trainers import FittedSFTTrainer, sft_rows

    prepare(training, model, run.accelerate_config)
    if runs.is_finished(training.output_dir, resolved):
        return
    training.dataset_kwargs = {"skip_prepare_dataset": True}  # rows come with labels
    rows = partial(sft_rows, completion_only=training.completion_only_loss is not False)
    source = model.model_name_or_path, model.model_revision
    tokenizer = load_tokenizer(*source, training.trust_remote_code)
    runs.check_model(*source, tokenizer, training.max_length, training.trust_remote_code)
    splits = load_pairs(data, tokenizer, training.max_length, need_pairs=False)
    evaluate = training.eval_strategy != "no"
    engine = partial(PackedSFTTrainer, row_length=run.row_length) if run.shared_prefix else FittedSFTTrainer
    trainer = runs.build(
        lambda: engine(
            model=model.model_name_or_path,
            args=training,
            train_dataset=rows(splits["train"].pairs),
            eval_dataset=rows(runs.held_out(splits["test"].pairs, run.eval_pairs)) if evaluate else None,
            processing_class=tokenizer,
            **adapters.configs(model),
        ),
        *source,
    )
    runs.train(trainer, resolved, {name: split.summary for name, split in splits.items()})


if __name__ == "__main__":
    with one_sentence(), told_of_lost_peers():
        main()
