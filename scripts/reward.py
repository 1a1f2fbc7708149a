"""Train an explicit reward model on the same pairs: what DPO's implicit reward is held against.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/reward.py \
        --config recipes/gpt2-medium-hh/reward.yaml --learning_rate 5e-6

`make reward` runs the same, and the SFT before it where that is missing. Flags of TRL's RewardConfig and ModelConfig
act, here and in the recipe, or are refused (--help). What it saves is what --reward_model_name_or_path takes.
"""

from functools import partial

from tinydpo.errors import one_sentence
from tinydpo.launching.arguments import DataArguments, RunArguments
from tinydpo.launching.parsing import parse_resolved
from tinydpo.training.peers import told_of_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, RewardConfig

    types = (DataArguments, RunArguments, RewardConfig, ModelConfig)
    (data, run, training, model), resolved = parse_resolved(*types, argv=argv)

    from tinydpo.engine.reward import FittedRewardTrainer, PackedRewardTrainer
    from tinydpo.models.ending import pad_with_end
    from tinydpo.training.runs import on_turns, train
    from tinydpo.training.start import build, start

    if (given := start(data, run, training, model, resolved)) is None:
        return
    engine = partial(PackedRewardTrainer, row_length=run.row_length) if run.shared_prefix else FittedRewardTrainer
    trainer = build(
        lambda: engine(
            model=model.model_name_or_path,
            args=training,
            train_dataset=given.train,
            eval_dataset=given.test,
            processing_class=pad_with_end(given.tokenizer, on_turns(given.summary["train"])),
        ),
        model,
    )
    train(trainer, resolved, given.summary, given.texts)


if __name__ == "__main__":
    with one_sentence(), told_of_lost_peers():
        main()
