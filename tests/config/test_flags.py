"""Flags that would mislead are refused before anything is loaded; all others are passed on."""

import importlib
import re
from pathlib import Path

import dpo
import pytest
from running import run
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from tinydpo.config.arguments import DataArguments, ReferenceArguments, RunArguments
from tinydpo.config.flags import check_flags
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import UserError

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}
# Stage, the flag that is refused, and the flags it comes with.
REFUSED = """
dpo  --truncation_mode keep_end
dpo  --padding_free true
sft  --dataset_text_field body
sft  --assistant_only_loss true
dpo  --bf16_full_eval true
dpo  --save_only_model true
dpo  --resume_from_checkpoint runs/dpo/checkpoint-8
dpo  --enable_jit_checkpoint true
dpo  --auto_find_batch_size true
dpo  --dataloader_drop_last true
dpo  --use_liger_kernel true
dpo  --fsdp full_shard
sft  --packing true
sft  --packing true --shared_prefix false
sft  --eval_packing true
sft  --packing_strategy bfd_split
sft  --shuffle_dataset true
sft  --pad_token <pad>
reward --label_smoothing_factor 0.1
dpo  --lora_dropout 0.1 --use_peft true
dpo  --batch_eval_metrics true
dpo  --eval_do_concat_batches false
dpo  --pad_to_multiple_of 8
sft  --neftune_noise_alpha 5
sft  --train_sampling_strategy group_by_length
dpo  --train_sampling_strategy batch_rebalance
dpo  --lora_r 4
dpo  --load_in_4bit true
reward --use_peft true
dpo  --loss_type sigmoidd
dpo  --loss_type sigmoid exo_pair
dpo  --label_smoothing 0.1
dpo  --label_smoothing_factor 0.1
dpo  --use_weighting true --loss_type aot
dpo  --use_weighting true --loss_type hinge
dpo  --use_weighting true --loss_type sigmoid sft --loss_weights 1 1
dpo  --warmup_steps 5 --lr_scheduler_type constant
dpo  --warmup_steps 5 --lr_scheduler_type reduce_lr_on_plateau
dpo  --load_best_model_at_end true --eval_steps 2 --save_steps 4
dpo  --sync_ref_model true --precompute_ref_log_probs true
dpo  --sync_ref_model true --use_peft true
dpo  --sync_ref_model true --ref_model_name_or_path no/other
""".strip().splitlines()
PASSED_ON = """
sft  --eval_packing false
dpo  --shared_prefix false --pad_to_multiple_of 8
dpo  --lora_r 4 --use_peft true
dpo  --lora_dropout 0.1 --use_peft true --shared_prefix false --disable_dropout false
dpo  --loss_type exo_pair --label_smoothing 1e-3
dpo  --loss_type sigmoid robust --label_smoothing 0.1
dpo  --sync_ref_model true
dpo  --use_weighting true --loss_type ipo
dpo  --warmup_steps 5 --lr_scheduler_type constant_with_warmup
dpo  --load_best_model_at_end true --eval_strategy steps --eval_steps 4 --save_steps 4
dpo  --load_best_model_at_end true --eval_strategy steps --eval_steps 4 --save_strategy best
""".strip().splitlines()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own, about flags that are refused here
@pytest.mark.parametrize("case", REFUSED)
def test_a_misleading_flag_is_refused_before_anything_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stage, *argv = case.split()
    if stage != "sft":
        script = importlib.import_module(stage)
        monkeypatch.setattr(script, "train_missing_model", lambda *_: pytest.fail("SFT trains before the refusal"))
    argv += ["--model_name_or_path", "no/model", "--dataset_name", "no.jsonl", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=f"^{argv[0].removeprefix('--')} is "):
        run(stage, *argv)
    assert not (tmp_path / "run").exists(), "a refused run left a folder behind"


def test_a_run_needs_a_token_budget(tmp_path: Path):
    (tmp_path / "dpo.yaml").write_text("max_length: null")
    with pytest.raises(UserError, match="max_length is not set"):
        dpo.main(["--config", str(tmp_path / "dpo.yaml"), "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize("case", PASSED_ON)
def test_a_flag_that_has_an_effect_is_passed_on(case: str):
    stage, *argv = case.split()
    types = (DataArguments, RunArguments, CONFIGS[stage], ModelConfig, ReferenceArguments)
    _, settings = parse_training_args(*types, argv=["--output_dir", "x", *argv])
    check_flags(stage, settings, CONFIGS[stage], ModelConfig)


@pytest.mark.parametrize("stage", CONFIGS)
def test_help_shows_what_matters_first_and_nothing_refused(stage: str, capsys: pytest.CaptureFixture[str]):
    flags = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            importlib.import_module(stage).main([option])
        flags[option] = set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert {"learning_rate", "max_length", "dataset_name"} < flags["--help"] < flags["--help-all"]
    assert len(flags["--help"]) <= 17 and "warmup_steps" in flags["--help-all"]
    refused = {"packing", "padding_free", "bf16_full_eval", "fsdp", "use_liger_kernel"}
    refused |= {"sft": set(), "dpo": {"label_smoothing_factor"}, "reward": {"use_peft", "lora_r"}}[stage]
    assert not refused & flags["--help-all"], "a flag is shown that every run refuses"


def test_a_reporter_that_is_not_installed_is_named_at_once(tmp_path: Path):
    argv = ["--model_name_or_path", "no/model", "--dataset_name", "no.jsonl", "--output_dir", tmp_path / "run"]
    with pytest.raises(UserError, match="report_to is neptune, but neptune is not installed"):
        run("dpo", *argv, "--report_to", "neptune")
