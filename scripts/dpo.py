"""Preference-tune a fine-tuned model with DPO; its checkpoint is the reference too, unless another is named.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/dpo.py \
        --config recipes/gpt2-medium-hh/dpo.yaml --beta 0.3

`make dpo` runs the same, and the SFT before it where that is missing. Flags of TRL's DPOConfig and ModelConfig
act, here and in the recipe, or are refused (--help).
"""

from functools import partial

from stages import get_config_path, train_missing_model

from tinydpo.config.arguments import DataArguments, ReferenceArguments, RunArguments
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import report_errors
from tinydpo.training.callbacks import report_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import DPOConfig, ModelConfig

    types = (DataArguments, RunArguments, DPOConfig, ModelConfig, ReferenceArguments)
    (data, run, training, model, _), resolved = parse_training_args(*types, argv=argv)
    if train_missing_model(model.model_name_or_path, get_config_path(argv), run.accelerate_config):
        # Its trainer has replaced the state of the processes, which `training` holds: make that anew.
        (data, run, training, model, _), resolved = parse_training_args(*types, argv=argv)

    from tinydpo.models import loading as adapters
    from tinydpo.training.setup import build_trainer, load_reference, prepare_training
    from tinydpo.training.train import train
    from tinydpo.training.trainers import FittedDPOTrainer, SharedPrefixDPOTrainer

    if (given := prepare_training(data, run, training, model, resolved)) is None:
        return
    configs = adapters.get_adapter_kwargs(model)
    reference = load_reference(resolved, training, configs["quantization_config"])
    engine = partial(SharedPrefixDPOTrainer, row_length=run.row_length) if run.shared_prefix else FittedDPOTrainer
    trainer = build_trainer(
        lambda: engine(
            model=model.model_name_or_path,
            ref_model=reference,
            args=training,
            train_dataset=given.train,
            eval_dataset=given.test,
            processing_class=given.tokenizer,
            **configs,
        ),
        model,
    )
    train(trainer, resolved, given.summary, given.texts)


if __name__ == "__main__":
    with report_errors(), report_lost_peers():
        main()
