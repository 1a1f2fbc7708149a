"""Train an explicit reward model on the same pairs: what DPO's implicit reward is held against.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/reward.py \
        --config recipes/gpt2-medium-hh/reward.yaml --learning_rate 5e-6

`make reward` runs the same, and the SFT before it where that is missing. Flags of TRL's RewardConfig and ModelConfig
act, here and in the recipe, or are refused (--help). What it saves is what --reward_model_name_or_path takes.
"""

from functools import partial

from stages import get_config_path, train_missing_model

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import report_errors
from tinydpo.training.callbacks import report_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, RewardConfig

    types = (DataArguments, RunArguments, RewardConfig, ModelConfig)
    (data, run, training, model), resolved = parse_training_args(*types, argv=argv)
    if train_missing_model(model.model_name_or_path, get_config_path(argv), run.accelerate_config):
        # Its trainer has replaced the state of the processes, which `training` holds: make that anew.
        (data, run, training, model), resolved = parse_training_args(*types, argv=argv)

    from tinydpo.models.stop_tokens import pad_with_end_token
    from tinydpo.training.reward_trainer import FittedRewardTrainer, PackedRewardTrainer
    from tinydpo.training.setup import build_trainer, prepare_training
    from tinydpo.training.train import is_chat_data, train

    if (given := prepare_training(data, run, training, model, resolved)) is None:
        return
    engine = partial(PackedRewardTrainer, row_length=run.row_length) if run.shared_prefix else FittedRewardTrainer
    trainer = build_trainer(
        lambda: engine(
            model=model.model_name_or_path,
            args=training,
            train_dataset=given.train,
            eval_dataset=given.test,
            processing_class=pad_with_end_token(given.tokenizer, is_chat_data(given.summary["train"])),
        ),
        model,
    )
    train(trainer, resolved, given.summary, given.texts)


if __name__ == "__main__":
    with report_errors(), report_lost_peers():
        main()
