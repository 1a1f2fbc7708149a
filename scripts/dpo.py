r"""Preference-tune a fine-tuned model with DPO; it is its own reference, unless another one is named.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/dpo.py \
        --config recipes/gpt2-medium-hh/dpo.yaml --beta 0.3

`make dpo` runs the same. The SFT model that the recipe starts from is trained first where it is missing. The flags are
those of TRL's DPOConfig and ModelConfig and our own (--help-all); a flag known to mislead here is refused.
"""

from stages import end_processes, get_config_path, suggest_command, train_missing_model

from tinydpo.config.arguments import DataArguments, ReferenceArguments, RunArguments
from tinydpo.config.flags import check_flags
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import get_rank, report_errors
from tinydpo.run_folder import RunFolder


def main(argv: list[str] | None = None) -> None:
    from trl import DPOConfig, ModelConfig

    types = (DataArguments, RunArguments, DPOConfig, ModelConfig, ReferenceArguments)
    (data, run, training, model, _), settings = parse_training_args(*types, argv=argv)
    check_flags("dpo", settings, training, model)
    recipe = get_config_path(argv)
    if train_missing_model(model.model_name_or_path, recipe, run.accelerate_config, data.dataset_name):
        # Its trainer has replaced the state of the processes, which `training` holds: parse again.
        (data, run, training, model, _), settings = parse_training_args(*types, argv=argv)

    # The trainers take seconds to import: only once the flags are known to be right.
    from tinydpo.models.loading import get_adapter_kwargs
    from tinydpo.training.setup import explain_trainer_errors, load_reference, prepare_training
    from tinydpo.training.train import train
    from tinydpo.training.trainers import FittedDPOTrainer, SharedPrefixDPOTrainer

    prepared = prepare_training("dpo", data, run, training, model, settings)
    if prepared is None:
        return
    kwargs = get_adapter_kwargs(model)
    if run.shared_prefix:
        trainer_class = SharedPrefixDPOTrainer
        kwargs["row_length"] = run.row_length
    else:
        trainer_class = FittedDPOTrainer
    with explain_trainer_errors(model):
        trainer = trainer_class(
            model=model.model_name_or_path,
            # Not in a variable here, so that it leaves memory once its log-probs are cached.
            ref_model=load_reference(settings, training, kwargs["quantization_config"]),
            args=training,
            train_dataset=prepared.train,
            eval_dataset=prepared.test,
            processing_class=prepared.tokenizer,
            **kwargs,
        )
    train(trainer, prepared)
    if not get_rank():
        print_verdict(training.output_dir, len(prepared.test or ()))


def print_verdict(output_dir: str, held_out: int) -> None:
    """Print how the policy does on the pairs that were held out in training, if any, and what to do next."""
    from tinydpo.evaluation.table import summarize_accuracy

    accuracy = RunFolder(output_dir).read_results().get("eval_rewards/accuracies")
    if accuracy is not None:
        print(summarize_accuracy(accuracy, held_out))
    print(f"Next, measure it on all held-out pairs and on its answers: {suggest_command('evaluate', output_dir)}")


if __name__ == "__main__":
    with report_errors():
        main()
        end_processes()
