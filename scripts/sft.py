r"""Fine-tune a model on the preferred answers: the reference model that DPO starts from.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/sft.py \
        --config recipes/gpt2-medium-hh/sft.yaml --learning_rate 2e-5

`make sft` runs the same. The flags are those of TRL's SFTConfig and ModelConfig and our own (--help-all). A flag
known to mislead here is refused.
"""

from stages import end_processes

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.flags import check_flags
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import report_errors


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, SFTConfig

    types = (DataArguments, RunArguments, SFTConfig, ModelConfig)
    (data, run, training, model), settings = parse_training_args(*types, argv=argv)
    check_flags("sft", settings, training, model)

    # The trainers take seconds to import: only once the flags are known to be right.
    from tinydpo.models.loading import get_adapter_kwargs
    from tinydpo.training.setup import explain_trainer_errors, prepare_training
    from tinydpo.training.train import train
    from tinydpo.training.trainers import FittedSFTTrainer, PackedSFTTrainer, build_sft_rows

    prepared = prepare_training("sft", data, run, training, model, settings)
    if prepared is None:
        return
    training.dataset_kwargs = {"skip_prepare_dataset": True}  # rows are tokens with labels already
    completion_only = training.completion_only_loss is not False
    kwargs = get_adapter_kwargs(model)
    if run.shared_prefix:
        trainer_class = PackedSFTTrainer
        kwargs["row_length"] = run.row_length
    else:
        trainer_class = FittedSFTTrainer
    with explain_trainer_errors(model):
        trainer = trainer_class(
            model=model.model_name_or_path,
            args=training,
            train_dataset=build_sft_rows(prepared.train, completion_only),
            eval_dataset=build_sft_rows(prepared.test, completion_only) if prepared.test else None,
            processing_class=prepared.tokenizer,
            **kwargs,
        )
    train(trainer, prepared)


if __name__ == "__main__":
    with report_errors():
        main()
        end_processes()
