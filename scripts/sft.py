"""Fine-tune a model on the preferred answers: the reference model that DPO starts from.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/sft.py \
        --config recipes/gpt2-medium-hh/sft.yaml --learning_rate 2e-5

`make sft` runs the same. Flags of TRL's SFTConfig and ModelConfig (--help) act, here and in the recipe, or are
refused.
"""

from functools import partial

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import report_errors
from tinydpo.training.callbacks import report_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, SFTConfig

    types = (DataArguments, RunArguments, SFTConfig, ModelConfig)
    (data, run, training, model), resolved = parse_training_args(*types, argv=argv)

    from tinydpo.models import loading as adapters
    from tinydpo.training.setup import build_trainer, prepare_training
    from tinydpo.training.train import train
    from tinydpo.training.trainers import FittedSFTTrainer, PackedSFTTrainer, build_sft_rows

    if (given := prepare_training(data, run, training, model, resolved, need_pairs=False)) is None:
        return
    training.dataset_kwargs = {"skip_prepare_dataset": True}  # rows come with labels
    rows = partial(build_sft_rows, completion_only=training.completion_only_loss is not False)
    engine = partial(PackedSFTTrainer, row_length=run.row_length) if run.shared_prefix else FittedSFTTrainer
    trainer = build_trainer(
        lambda: engine(
            model=model.model_name_or_path,
            args=training,
            train_dataset=rows(given.train),
            eval_dataset=given.test and rows(given.test),
            processing_class=given.tokenizer,
            **adapters.get_adapter_kwargs(model),
        ),
        model,
    )
    train(trainer, resolved, given.summary, given.texts)


if __name__ == "__main__":
    with report_errors(), report_lost_peers():
        main()
