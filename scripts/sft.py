"""Fine-tune a model on the preferred answers: the reference model that DPO starts from.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/sft.py \
        --config recipes/gpt2-medium-hh/sft.yaml --learning_rate 2e-5

`make sft` runs the same. Flags of TRL's SFTConfig and ModelConfig (--help) act, here and in the recipe, or are
refused.
"""

from functools import partial

from tinydpo.errors import one_sentence
from tinydpo.launching.arguments import DataArguments, RunArguments
from tinydpo.launching.parsing import parse_resolved
from tinydpo.training.peers import told_of_lost_peers


def main(argv: list[str] | None = None) -> None:
    from trl import ModelConfig, SFTConfig

    types = (DataArguments, RunArguments, SFTConfig, ModelConfig)
    (data, run, training, model), resolved = parse_resolved(*types, argv=argv)

    from tinydpo.engine.shared_prefix import PackedSFTTrainer
    from tinydpo.engine.trainers import FittedSFTTrainer, sft_rows
    from tinydpo.models import adapters
    from tinydpo.training.runs import train
    from tinydpo.training.start import build, start

    if (given := start(data, run, training, model, resolved, need_pairs=False)) is None:
        return
    training.dataset_kwargs = {"skip_prepare_dataset": True}  # rows come with labels
    rows = partial(sft_rows, completion_only=training.completion_only_loss is not False)
    engine = partial(PackedSFTTrainer, row_length=run.row_length) if run.shared_prefix else FittedSFTTrainer
    trainer = build(
        lambda: engine(
            model=model.model_name_or_path,
            args=training,
            train_dataset=rows(given.train),
            eval_dataset=given.test and rows(given.test),
            processing_class=given.tokenizer,
            **adapters.configs(model),
        ),
        model,
    )
    train(trainer, resolved, given.summary, given.texts)


if __name__ == "__main__":
    with one_sentence(), told_of_lost_peers():
        main()
