r"""Train an explicit reward model on the same pairs, to compare DPO's implicit reward with.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/reward.py \
        --config recipes/gpt2-medium-hh/reward.yaml --learning_rate 5e-6

`make reward` runs the same. The SFT model that the recipe starts from is trained first where it is missing. The flags
are those of TRL's RewardConfig and ModelConfig and our own (--help-all); a flag known to mislead here is refused.
Evaluation takes the result as --reward_model_name_or_path.
"""

from stages import end_processes, get_config_path, train_missing_model

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.flags import check_flags
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import report_errors
from tinydpo.run_folder import is_chat_data


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, RewardConfig

    types = (DataArguments, RunArguments, RewardConfig, ModelConfig)
    (data, run, training, model), settings = parse_training_args(*types, argv=argv)
    check_flags("reward", settings, training, model)
    recipe = get_config_path(argv)
    if train_missing_model(model.model_name_or_path, recipe, run.accelerate_config, data.dataset_name):
        # Its trainer has replaced the state of the processes, which `training` holds: parse again.
        (data, run, training, model), settings = parse_training_args(*types, argv=argv)

    # The trainers take seconds to import: only once the flags are known to be right.
    from tinydpo.models.stop_tokens import get_end_token_id
    from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer
    from tinydpo.training.setup import explain_trainer_errors, prepare_training
    from tinydpo.training.train import train

    prepared = prepare_training("reward", data, run, training, model, settings)
    if prepared is None:
        return
    # The score is read at the last token that is not padding: with the end token as padding, at an answer's last word.
    tokenizer = prepared.tokenizer
    end_token_id = get_end_token_id(tokenizer, is_chat_data(prepared.summary["train"]))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end_token_id)
    kwargs = {}
    if run.shared_prefix:
        trainer_class = PackedRewardTrainer
        kwargs["row_length"] = run.row_length
    else:
        trainer_class = FittedRewardTrainer
    with explain_trainer_errors(model):
        trainer = trainer_class(
            model=model.model_name_or_path,
            args=training,
            train_dataset=prepared.train,
            eval_dataset=prepared.test,
            processing_class=tokenizer,
            **kwargs,
        )
    train(trainer, prepared)


if __name__ == "__main__":
    with report_errors():
        main()
        end_processes()
