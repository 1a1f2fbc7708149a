"""Every flag of TRL's and transformers': it acts, and a test shows it; it is refused; or it is the library's own."""

import ast
import gc
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, run
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.flags import REFUSED, check_flags
from tinydpo.config.launch import SHARDING_FLAGS
from tinydpo.config.recipe import parse_training_args
from tinydpo.errors import UserError

CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}


def flags_of(*configs: type) -> set[str]:
    return {field.name for config in configs for field in fields(config) if field.init}


FLAGS = flags_of(*CONFIGS.values(), ModelConfig)

# What this project decides, changes or relies on, by the test that shows it.
ACTS = {
    "data/test_fitting.py::test_what_fitting_promises": "max_length",
    "training/test_by_length.py::test_batches_hold_pairs_of_like_cost": "train_sampling_strategy remove_unused_columns",
    "training/test_compiled.py::test_it_compiles_once_for_all_shapes": "torch_compile torch_compile_backend "
    "torch_compile_mode",
    "training/test_losses.py::test_a_row_of_the_page_trains": "loss_type loss_weights label_smoothing beta ld_alpha "
    "f_divergence_type f_alpha_divergence_coef discopop_tau use_weighting sync_ref_model ref_model_sync_steps "
    "ref_model_mixup_alpha precompute_ref_log_probs",
    "training/test_packed_models.py::test_attention_without_4d_masks_is_refused": "attn_implementation",
    "training/test_reward.py::test_a_step_is_that_of_trl": "center_rewards_coefficient",
    "training/test_shared_prefix.py::test_dropout_is_one_sentence_and_its_advice_works": "disable_dropout",
    "config/test_arguments.py::test_both_names_of_activation_checkpointing_work": "activation_checkpointing "
    "gradient_checkpointing",
    "config/test_arguments.py::test_output_dir_follows_the_recipe": "output_dir",
    "config/test_arguments.py::test_the_old_name_of_its_kwargs_works_too": "activation_checkpointing_kwargs "
    "gradient_checkpointing_kwargs",
    "config/test_flags.py::test_a_reporter_that_is_not_installed_is_told_at_once": "report_to",
    "config/test_flags.py::test_an_optimizer_that_cannot_be_made_is_told_at_once": "optim optim_args "
    "optim_target_modules lr_scheduler_type lr_scheduler_kwargs",
    "config/test_launch.py::test_a_recipe_is_the_same_training_on_any_number_of_devices": "gradient_accumulation_"
    "steps per_device_train_batch_size",
    "config/test_launch.py::test_real_arguments_on_the_cpu": "model_revision model_init_kwargs",
    "config/test_launch.py::test_what_the_user_set_stays": "bf16 fp16 use_cpu",
    "models/test_adapters.py::test_adapters_of_conv1d_train_and_the_base_stays": "use_peft lora_r lora_alpha "
    "lora_target_modules lora_dropout",
    "models/test_adapters.py::test_qlora_trains_after_a_reference_pass_and_evaluations": "load_in_4bit dtype "
    "bnb_4bit_quant_type use_bnb_nested_quant",
    "training/test_tokenizer_flags.py::test_an_end_token_is_trained_on_and_saved": "eos_token",
    "training/test_tokenizer_flags.py::test_a_chat_template_is_trained_on_and_saved": "chat_template_path",
    "training/test_tokenizer_flags.py::test_prompts_carry_loss_on_request": "completion_only_loss",
    "data/test_workers.py::test_as_many_processes_as_asked_read": "dataset_num_proc",
    "training/test_nothing_lost.py::test_a_checkpoint_that_was_asked_for_must_be_whole": "resume_from_checkpoint",
    "training/test_nothing_lost.py::test_a_models_own_code_runs_on_request_alone": "trust_remote_code",
    "training/test_nothing_lost.py::test_divergence_ends_the_run_early": "logging_nan_inf_filter",
    "training/test_nothing_lost.py::test_sigterm_to_the_whole_group_saves_once": "dataloader_num_workers",
    "training/test_nothing_lost.py::test_the_same_recipe_gives_the_same_weights": "seed",
    "training/test_scaling.py::test_a_lost_host_stops_the_other_and_the_same_commands_go_on": "ddp_timeout",
    "training/test_training.py::test_folder_holds_what_the_readme_promises": "save_steps save_total_limit",
    "training/test_training.py::test_sft_of_trl_counts_as_the_engine_does": "packing",
    "training/test_training.py::test_loss_falls": "model_name_or_path learning_rate",
}

# Handed to the library as they come; nothing here stands in their way.
PASSED_ON = """
    activation_offloading adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices bnb_4bit_quant_storage
    data_seed dataloader_in_order dataloader_multiprocessing_context dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_static_graph debug disable_tqdm eval_delay eval_on_start eval_packing eval_steps
    eval_strategy eval_use_gather_object full_determinism greater_is_better hub_always_push hub_model_id
    hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_num_input_tokens_seen
    label_smoothing_factor load_best_model_at_end load_in_8bit local_rank log_level log_level_replica
    log_on_each_node logging_first_step logging_steps logging_strategy lora_modules_to_save lora_target_parameters
    max_grad_norm max_steps metric_for_best_model neftune_noise_alpha num_train_epochs packing_strategy
    pad_to_multiple_of per_device_eval_batch_size precompute_ref_batch_size project push_to_hub
    restore_callback_states_from_checkpoint router_aux_loss_coef run_name save_on_each_node save_strategy
    skip_memory_metrics tf32 torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    use_dora use_rslora warmup_steps weight_decay
"""

# A case for each flag that is refused, the flag first: always, or in this company. "all" are the scripts that know it.
CASES = """
sft  --packing true
sft  --packing_strategy wrapped
sft  --eval_packing true
sft  --dataset_text_field body
sft  --dataset_kwargs {"skip_prepare_dataset":false}
sft  --shuffle_dataset true
sft  --assistant_only_loss true
sft  --metric_for_best_model rewards/accuracies
sft  --label_smoothing_factor 0.1 --loss_type dft
all  --truncation_mode keep_end
all  --padding_free true
all  --pad_to_multiple_of 64
all  --pad_token !
all  --length_column_name tokens
all  --prediction_loss_only true
all  --include_for_metrics loss
all  --batch_eval_metrics true
all  --eval_do_concat_batches false
all  --eval_accumulation_steps 1
all  --label_names x
all  --bf16_full_eval true --use_cpu true
all  --fp16_full_eval true
all  --do_train true
all  --do_eval true
all  --do_predict true
all  --save_only_model true
all  --enable_jit_checkpoint true
all  --auto_find_batch_size true
all  --accelerator_config {"split_batches":true}
all  --parallelism_config {"tp_size":2}
all  --fsdp full_shard
all  --fsdp_config {"version":2}
all  --deepspeed zero.json
all  --dataset_num_proc 0
all  --dataloader_drop_last true
all  --dataloader_persistent_workers true
all  --dataloader_multiprocessing_context spawn
all  --activation_offloading true --use_cpu true
all  --use_liger_kernel true
all  --liger_kernel_config {"rope":true}
all  --use_cache true
all  --neftune_noise_alpha 5
all  --lora_r 4
all  --lora_alpha 4
all  --lora_dropout 0.1
all  --lora_dropout 0.1 --use_peft true
all  --lora_target_modules all-linear
all  --lora_target_parameters x
all  --lora_modules_to_save ln_f
all  --lora_task_type SEQ_CLS --use_peft true
all  --use_rslora true
all  --use_dora true
all  --load_in_4bit true
all  --load_in_8bit true
all  --bnb_4bit_quant_type fp4 --use_peft true
all  --use_bnb_nested_quant true
all  --bnb_4bit_quant_storage uint8
all  --warmup_steps 5 --lr_scheduler_type constant
all  --lr_scheduler_kwargs {"num_cycles":2} --lr_scheduler_type constant
all  --metric_for_best_model nope
all  --activation_checkpointing_kwargs {"use_reentrant":true}
all  --load_best_model_at_end true --eval_strategy no --save_strategy no
all  --save_strategy best --eval_strategy no
all  --num_train_epochs 0
all  --debug tpu_metrics_debug
dpo  --precompute_ref_batch_size 0
dpo  --loss_type sigmoidd
dpo  --loss_type sigmoid exo_pair
dpo  --beta 0
dpo  --ld_alpha 1.5
dpo  --label_smoothing 0.1
dpo  --label_smoothing 0.5 --loss_type robust
dpo  --label_smoothing_factor 0.1
dpo  --f_divergence_type nope
dpo  --f_alpha_divergence_coef 0.1
dpo  --discopop_tau 0.1
dpo  --use_weighting true --loss_type aot
dpo  --ref_model_mixup_alpha 0.1
dpo  --ref_model_sync_steps 1
dpo  --ref_model_sync_steps 0 --sync_ref_model true
dpo  --sync_ref_model true --precompute_ref_log_probs true
dpo  --sync_ref_model true --use_peft true
dpo  --sync_ref_model true --ref_model_name_or_path no/other
dpo  --train_sampling_strategy batch_rebalance
reward --train_sampling_strategy batch_rebalance
reward --label_smoothing_factor 0.1
reward --use_peft true
reward --metric_for_best_model rewards/accuracies
""".strip().splitlines()


def names(texts: Any) -> set[str]:
    return {name for text in texts for name in text.split()}


def refusal(script: str, *argv: str) -> str:
    """The one sentence, of a run that has neither data nor model: told after them, it would be another."""
    with pytest.raises(UserError) as caught:
        run(script, "--model_name_or_path", "no/model", "--dataset_name", "no/data.jsonl", *argv)
    return str(caught.value)


def test_every_flag_is_in_one_list():
    acts = names(ACTS.values())
    refused = names(row.flags for row in REFUSED if row.when is None) | {
        *SHARDING_FLAGS,
        "parallelism_config",
    }  # the last by the parser, which has no type for it
    listed = [acts, names([PASSED_ON]), refused]
    assert not (missing := FLAGS - set().union(*listed)), f"accepted, and nobody knows whether they act: {missing}"
    assert not (gone := set().union(*listed) - FLAGS), f"no flags of the libraries any more: {gone}"
    twice = {name for name in FLAGS if sum(name in some for some in listed) > 1}
    assert not twice, f"in two lists: {twice}"


@pytest.mark.parametrize("named", ACTS)
def test_the_test_of_a_flag_exists(named: str):
    file, name = named.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in tests, f"nothing shows any more that {ACTS[named]} act"


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_effect_is_refused_before_anything_is_loaded(case: str, tmp_path: Path):
    which, *argv = case.split()
    flag = argv[0].removeprefix("--")
    scripts = [name for name, config in CONFIGS.items() if flag in flags_of(config, ModelConfig)]
    for script in scripts if which == "all" else (which,):
        told = refusal(script, *argv, "--output_dir", str(tmp_path / "run"))
        assert flag in told.split(",")[0].split(";")[0], f"the sentence is not about {flag}: {told}"
        assert not (tmp_path / "run").exists(), "a refused run left a folder behind"


def test_every_refusal_has_its_case():
    cases = {case.split()[1].removeprefix("--") for case in CASES}
    assert not (untried := names(row.flags for row in REFUSED) - cases), f"nothing shows that {untried} are refused"


def test_what_is_left_as_it_is_is_not_refused():
    recipes = [path for path in (ROOT / "recipes").glob("*/*.yaml") if path.name.startswith(tuple(CONFIGS))]
    assert len(recipes) > 5, "they lie elsewhere: nothing is tried here"
    for path in recipes:
        config = next(config for name, config in CONFIGS.items() if path.name.startswith(name))
        types = (DataArguments, RunArguments, config, ModelConfig)
        _, resolved = parse_training_args(*types, argv=["--config", str(path)])
        check_flags(path.stem.split("-")[0], resolved, config, ModelConfig)
    for flags in (
        "--eval_packing false",
        "--lora_dropout 0 --use_peft true",
        "--save_only_model false",
    ):
        _, resolved = parse_training_args(
            DataArguments, RunArguments, SFTConfig, ModelConfig, argv=["--output_dir", "x", *flags.split()]
        )
        check_flags("sft", resolved, SFTConfig, ModelConfig)


@pytest.mark.parametrize("name", [*INTEGRATION_TO_CALLBACK, "wandbb"])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # a traceback beside the sentence
def test_a_reporter_that_is_not_installed_is_told_at_once(name: str, tmp_path: Path):
    if name in get_available_reporting_integrations():
        pytest.skip(f"{name} is installed here")
    told = refusal("dpo", "--report_to", name, "--output_dir", str(tmp_path / "run"))
    assert f"report_to is {name}" in told and "--report_to none" in told, f"not a sentence about it: {told}"
    gc.collect()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--optim", "adamw_torch", "--optim_args", "momentum=0.9"], "optim_args"),
        (["--optim", "sgd", "--optim_args", "momentum"], "name=value"),
        (["--optim_target_modules", "all-linear"], "galore"),
        (["--optim", "galore_adamw"], "galore"),
        (["--optim", "galore_adamw", "--optim_target_modules", "all-linear"], "galore_torch"),
        (["--optim", "apollo_adamw", "--optim_target_modules", "all-linear"], "apollo"),
        (["--adam_beta1", "2"], "beta"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
        (["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", '{"nope":1}'], "nope"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "num_decay_steps"),
    ],
)
def test_an_optimizer_that_cannot_be_made_is_told_at_once(argv: list[str], reason: str, tmp_path: Path):
    told = refusal("dpo", *argv, "--output_dir", str(tmp_path / "run"))
    assert told.startswith("optim is ") and reason in told, f"not a sentence about it: {told}"


def test_an_optimizer_that_can_be_made_goes_on(tmp_path: Path):
    for argv in (["--optim", "sgd", "--optim_args", "momentum=0.9"], ["--lr_scheduler_type", "greedy"]):
        told = refusal("sft", *argv, "--output_dir", str(tmp_path / "run"))
        assert "no/model" in told, f"{argv} is refused: {told}"


@pytest.mark.slow
@pytest.mark.parametrize("script", CONFIGS)
def test_metrics_that_may_choose_the_best_are_those_of_an_evaluation(
    script: str, tiny_model: Path, task: Path, tmp_path: Path
):
    from tinydpo.config.flags import DPO_METRICS, METRICS, REWARD_METRICS

    run(script, "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path / "run",
        "--max_steps", "1", "--save_strategy", "no")  # fmt: skip
    results = json.loads((tmp_path / "run/train_results.json").read_text())
    known = {"sft": METRICS, "dpo": METRICS | DPO_METRICS, "reward": REWARD_METRICS}[script] - {"aux_loss"}
    assert {f"eval_{name}" for name in known} <= set(results), "a metric that is allowed is never there"
