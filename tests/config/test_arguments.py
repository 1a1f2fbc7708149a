"""Recipes and the command line: every flag of TRL's, strict, the command line wins, one sentence for a mistake."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import ROOT
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from tinydpo.config.arguments import DataArguments, RunArguments
from tinydpo.config.recipe import parse_args, parse_training_args
from tinydpo.errors import UserError, report_errors

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
DPO = (DataArguments, RunArguments, DPOConfig, ModelConfig)
SFT = (DataArguments, RunArguments, SFTConfig, ModelConfig)
REWARD = (DataArguments, RunArguments, RewardConfig, ModelConfig)


@pytest.fixture
def recipe(tmp_path: Path):
    """Write YAML text (or a dict) and return the arguments that read it."""

    def write(text: str | dict, *more: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), encoding="utf-8")
        return ["--config", str(path), *more]

    return write


def mistake(argv: list[str], types: tuple = DPO) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(*types, argv=argv)
    return " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),  # an abbreviation, which argparse would take in silence
        ("leanring_rate", "learning_rate"),
        ("bta", "beta"),
        ("pair_per_step", "pairs_per_step"),
        ("dataset_nam", "dataset_name"),
        ("model_name", "model_name_or_path"),
        ("eval_stratgy", "eval_strategy"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(recipe, key: str, nearest: str):
    told = {
        "YAML": mistake(recipe({key: 1})),
        "--key value": mistake([f"--{key}", "1"]),
        "--key=value": mistake([f"--{key}=1"]),
        "-key": mistake([f"-{key}", "1"]),
        "--hyphens": mistake([f"--{key.replace('_', '-')}", "1"]),
    }
    for where, message in told.items():
        assert repr(key) in message, f"{where}: the message does not name the key {key!r}: {message}"
        assert repr(nearest) in message, f"{where}: the message does not offer {nearest!r}: {message}"
    assert "recipe.yaml" in told["YAML"], f"the message does not name the file: {told['YAML']}"
    assert "command line" in told["--key value"], f"the message does not say where: {told['--key value']}"


def test_what_belongs_to_no_flag_is_named():
    assert "'stray'" in mistake(["stray"])
    assert "'config'" in mistake(["--conf", "x.yaml"]), "an abbreviated --config is not told as such"
    assert "expected one argument" in mistake(["--beta"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: fast", "float"),
        ("learning_rate:", "float"),
        ("learning_rate: true", "float"),
        ("beta: [0.1, 0.2]", "float"),
        ("beta: {a: 1}", "float"),
        ("max_steps: 1e3", "int"),
        ("max_steps: 1.5", "int"),
        ("seed: true", "int"),
        ("use_cpu: maybe", "true or false"),
        ("eval_strategy: sometimes", "no, steps, epoch"),
        ("dtype: float8", "float32"),
        ("on_bad_row: ignore", "stop, skip"),
        ("optim: adamm", "adamw_torch"),
        ("loss_type: []", "a list of text"),
        ("loss_type: [null]", "a list of text"),
        ("loss_type: [[sigmoid]]", "a list of text"),
        ("loss_weights: [1, x]", "a list of float"),
        ("run_name: true", "text"),
        ("dataset_train_split: [a, b]", "text"),
        ("output_dir: {a: b}", "text"),
        ("model_init_kwargs: eager", "a mapping"),
        ("debug: [nothing]", "a list of"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_and_key(recipe, text: str, expected: str):
    message = mistake(recipe(text))
    key = text.split(":")[0]
    assert f"recipe.yaml: {key} is " in message, f"file and key are not named: {message}"
    assert expected in message, f"what is expected is not told: {message}"


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--max_steps", "1.5"], "--max_steps"),
        (["--eval_strategy", "sometimes"], "--eval_strategy"),
        (["--use_cpu", "maybe"], "Truthy"),
        (["--model_init_kwargs", "{a"], "--model_init_kwargs"),
        (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs"),
        (["--accelerator_config", "missing.json"], "accelerator_config"),
        (["--pad_to_multiple_of", "x"], "pad_to_multiple_of"),
        (["--test_split_size", "2"], "test_split_size"),
        (["--eval_pairs", "0"], "eval_pairs"),
        (["--column", "question"], "column"),
        (["--column", "question=promt"], "column"),
        (["--column", "a=prompt", "--column", "b=chosen"], "--column"),
        (["--role", "=user"], "role"),
        (["--max_question_length", "0"], "max_question_length"),
        (["--load_best_model_at_end", "true"], "--load_best_model_at_end"),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1"], "loss_weights"),
        (["--warmup_steps", "-1"], "warmup_steps"),
        (["--bf16", "true", "--fp16", "true"], "fp16"),
        (["--load_in_4bit", "--load_in_8bit"], "8 bit and 4 bit"),
    ],
)
def test_a_bad_value_on_the_command_line_is_one_sentence(tmp_path: Path, argv: list[str], flag: str):
    message = mistake(["--output_dir", str(tmp_path / "out"), *argv])
    assert flag in message, f"{argv}: the message does not say which flag is wrong: {message}"
    assert not (tmp_path / "out").exists(), "a refused command line left an output folder behind"


def test_a_mistake_exits_with_one_line_and_no_traceback(recipe, capsys):
    with pytest.raises(SystemExit) as caught, report_errors():
        parse_args(*DPO, argv=recipe("a: [\nb: c"))
    out, err = capsys.readouterr()
    assert caught.value.code == 1, "a mistake must not look like success to make or a shell script"
    assert err.startswith("error: ") and err.count("\n") == 1, f"not one line: {err!r}"
    assert not out and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),  # text in YAML 1.1
        ("learning_rate: 5.0e-5", "learning_rate", 5e-5),
        ("max_grad_norm: 1", "max_grad_norm", 1.0),
        ("loss_type: sigmoid", "loss_type", ["sigmoid"]),
        ("loss_type: [sigmoid, sft]", "loss_type", ["sigmoid", "sft"]),
        ("eval_strategy: no", "eval_strategy", "no"),  # a bare no is false in YAML 1.1
        ("eval_strategy: 'no'", "eval_strategy", "no"),
        ("save_strategy: false", "save_strategy", "no"),
        ("disable_dropout: off", "disable_dropout", False),
        ("disable_dropout: 'false'", "disable_dropout", False),
        ("max_steps: 1_000", "max_steps", 1000),
        ("save_total_limit: null", "save_total_limit", None),
        ("run_name: 2024", "run_name", "2024"),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("report_to: none", "report_to", []),
        ("model_init_kwargs: {attn_implementation: eager}", "model_init_kwargs", {"attn_implementation": "eager"}),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("liger_kernel_config: {rope: true}", "liger_kernel_config", {"rope": True}),
        ("include_num_input_tokens_seen: all", "include_num_input_tokens_seen", "all"),
        ("fsdp: false", "fsdp", False),
    ],
)
def test_yaml_values_come_out_as_meant(recipe, text: str, key: str, value: object):
    _, _, training, _ = parse_args(*DPO, argv=recipe(text))
    got = getattr(training, key)
    assert getattr(got, "value", got) == value, f"{text!r} trains with {key} {got!r}"
    assert isinstance(got, type(value)) or hasattr(got, "value")


def test_mappings_on_the_command_line_are_json(recipe):
    by_yaml, yaml_resolved = parse_training_args(*DPO, argv=recipe({"model_init_kwargs": {"a": 1}}))
    by_flag, flag_resolved = parse_training_args(*DPO, argv=recipe({}, "--model_init_kwargs", json.dumps({"a": 1})))
    assert by_yaml[2].model_init_kwargs == by_flag[2].model_init_kwargs == {"a": 1}
    assert yaml_resolved == flag_resolved, "the same run would not be recognised as the same"
    assert parse_args(*DPO, argv=recipe({}, "--liger_kernel_config", '{"rope": true}'))[2].liger_kernel_config


def test_the_command_line_wins(recipe):
    argv = recipe("beta: 0.1\nseed: 1\nloss_type: [ipo]\nuse_cpu: true\neval_pairs: 7\nmodel_name_or_path: here\n")
    _, run, training, model = parse_args(*DPO, argv=argv)
    assert (training.beta, training.seed, training.loss_type, run.eval_pairs) == (0.1, 1, ["ipo"], 7)
    more = ["--beta", "0.3", "--seed=2", "--loss_type", "sigmoid", "sft", "--eval-pairs", "9"]
    _, run, training, model = parse_args(*DPO, argv=[*argv, *more, "--model_name_or_path", "there"])
    assert (training.beta, training.seed, training.loss_type, run.eval_pairs) == (0.3, 2, ["sigmoid", "sft"], 9)
    assert model.model_name_or_path == "there"


@pytest.mark.parametrize(
    ("name", "revision", "unpinned"),
    [("model_name_or_path", "model_revision", "main"), ("dataset_name", "dataset_revision", None)],
)
def test_a_pinned_revision_goes_with_its_own_id(recipe, name: str, revision: str, unpinned: str | None):
    def came_to(*more: str) -> str | None:
        return parse_training_args(*DPO, argv=recipe({name: "org/own", revision: "abc"}, *more))[1][revision]

    assert came_to() == "abc", "the recipe's pinned revision is not used"
    assert came_to(f"--{name}", "org/own") == "abc", "naming the recipe's own id again drops its revision"
    assert came_to(f"--{name}", "org/other") == unpinned, "another id would be looked up at this one's commit"
    assert came_to(f"--{name}=org/other", f"--{revision}=def") == "def"
    assert came_to(f"--{name}=org/other", f"--{revision.replace('_', '-')}=abc") == "abc", "asked for by name"
    assert came_to(f"--{revision}", "def") == "def", "the command line does not win"


def test_an_unreadable_recipe_is_named(tmp_path: Path, recipe):
    assert "missing.yaml" in mistake(["--config", "missing.yaml"])
    assert "missing.yaml" in mistake(["--config=missing.yaml"])
    assert "no file" in mistake(["--config"])
    assert "no file" in mistake(["--config", str(tmp_path)])
    assert "twice" in mistake([*recipe({}), "--config", "x.yaml"])
    for text in ("beta: [", "- beta", "beta", "", "beta: 0.1\nbeta: 0.2", "on: 1", "1: 2", "env: [A]"):
        assert "recipe.yaml" in mistake(recipe(text)), f"{text!r}: the file is not named"
    assert "'beta' stands there twice" in mistake(recipe("beta: 0.1\nseed: 1\nbeta: 0.2"))
    (tmp_path / "latin.yaml").write_bytes("run_name: é".encode("latin-1"))
    assert "latin.yaml" in mistake(["--config", str(tmp_path / "latin.yaml")])


def test_config_may_stand_anywhere(recipe):
    argv = recipe({"beta": 0.2, "seed": 5})
    assert parse_args(*DPO, argv=[f"--config={argv[1]}", "--seed", "6"])[2].beta == 0.2
    training = parse_args(*DPO, argv=["--seed", "6", *argv])[2]
    assert (training.beta, training.seed) == (0.2, 6), "flags before --config are lost"


def test_env_in_a_recipe_is_set(recipe, monkeypatch):
    monkeypatch.setenv("TINYDPO_TEST", "old")
    parse_args(*DPO, argv=recipe({"env": {"TINYDPO_TEST": 1}}))
    import os

    assert os.environ["TINYDPO_TEST"] == "1", "TRL's `env` key has no effect"


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers' about the old name, at every start
@pytest.mark.parametrize(
    ("text", "argv", "on"),
    [
        ("{}", [], True),  # TRL's default
        ("activation_checkpointing: false", [], False),
        ("gradient_checkpointing: false", [], False),
        ("activation_checkpointing: false", ["--gradient_checkpointing", "true"], True),
        ("activation_checkpointing: false", ["--gradient-checkpointing"], True),
        ("activation_checkpointing: true", ["--no_gradient_checkpointing"], False),
        ("activation_checkpointing: true", ["--gradient_checkpointing=false"], False),
        ("gradient_checkpointing: true", ["--activation_checkpointing", "false"], False),
        ("gradient_checkpointing: false", ["--activation_checkpointing"], True),
    ],
)
def test_both_names_of_activation_checkpointing_work(recipe, text: str, argv: list[str], on: bool):
    (_, _, training, _), resolved = parse_training_args(*DPO, argv=recipe(text, *argv))
    assert training.activation_checkpointing is on, f"{text} and {argv} train with it {'off' if on else 'on'}"
    assert resolved["activation_checkpointing"] is resolved["gradient_checkpointing"] is on


def test_the_old_name_of_its_kwargs_works_too(recipe):
    text = {"activation_checkpointing_kwargs": {"use_reentrant": True}}
    argv = recipe(text, "--gradient_checkpointing_kwargs", '{"use_reentrant": false}')
    assert parse_args(*DPO, argv=argv)[2].activation_checkpointing_kwargs == {"use_reentrant": False}


def test_output_dir_follows_the_recipe(recipe, tmp_path: Path):
    assert parse_args(*DPO, argv=recipe({}))[2].output_dir == f"runs/{tmp_path.name}/recipe"
    assert parse_args(*DPO, argv=recipe({}, "--output_dir", "there"))[2].output_dir == "there"
    assert "output_dir" in mistake([])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_recipe_parses(path: Path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not {"bf16", "fp16", "use_cpu"} & set(keys), "recipes leave precision and device to the scripts"
    if path.name.startswith("evaluate"):
        from tinydpo.evaluation.arguments import EvaluateArguments
        from tinydpo.evaluation.rewards import RewardArguments

        parsed = parse_args(EvaluateArguments, RewardArguments, DataArguments, argv=["--config", str(path)])
    elif path.name == "winrate.yaml":
        from tinydpo.evaluation.judge import JudgeArguments
        from tinydpo.evaluation.winrate import WinrateArguments

        judge = ["--judge_model", "m", *([] if "judge_base_url" in keys else ["--judge_base_url", "http://host/v1"])]
        parsed = parse_args(WinrateArguments, JudgeArguments, DataArguments, argv=["--config", str(path), *judge])
    elif path.name == "frontier.yaml":
        from tinydpo.evaluation.frontier import FrontierArguments
        from tinydpo.evaluation.rewards import RewardArguments

        parsed = parse_args(FrontierArguments, RewardArguments, DataArguments, argv=["--config", str(path)])
        assert Path(keys["dpo_config"]).parent.name == path.parent.name, "a frontier of another recipe's runs"
    elif path.name == "pairs.yaml":
        from tinydpo.evaluation.on_policy import PairsArguments
        from tinydpo.evaluation.rewards import RewardArguments

        parsed = parse_args(PairsArguments, RewardArguments, DataArguments, argv=["--config", str(path)])
    else:
        types = {"sft": SFT, "reward": REWARD}.get(path.stem.split("-")[0], DPO)
        parsed = parse_args(*types, argv=["--config", str(path)])
        batch = parsed[2].per_device_train_batch_size * parsed[2].gradient_accumulation_steps
        assert batch == keys["pairs_per_step"] == parsed[1].pairs_per_step
        assert parsed[2].activation_checkpointing is keys["activation_checkpointing"]
    for key, value in keys.items():
        if key not in ("per_device_train_batch_size", "report_to"):
            holder = next(part for part in parsed if hasattr(part, key))
            got = getattr(holder, key)
            assert getattr(got, "value", got) == value, f"{path.name} says {key}: {value}, and {got!r} is used"


def test_another_script_may_read_a_training_recipe():
    argv = ["--config", str(ROOT / "recipes/gpt2-medium-hh/sft.yaml")]
    (data,) = parse_args(DataArguments, argv=argv, ignored=SFT[1:])
    assert data.dataset_name == "Anthropic/hh-rlhf"
    with pytest.raises(UserError, match="not a known key"):
        parse_args(DataArguments, argv=[*argv, "--learning_rate", "1"], ignored=SFT[1:])


@pytest.mark.parametrize("types", [SFT, DPO, REWARD], ids=["sft", "dpo", "reward"])
def test_help_lists_every_flag(types: tuple, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(*types, argv=["--help"])
    out = capsys.readouterr().out
    assert not caught.value.code, "--help must exit with status 0"
    missing = [f.name for kind in types for f in fields(kind) if f.init and f"--{f.name}" not in out]
    assert not missing, f"--help does not list {missing}"


NUMBERS = {
    **dict.fromkeys(("beta", "learning_rate", "weight_decay", "label_smoothing"), st.floats(1e-12, 1.0)),
    **dict.fromkeys(("adam_epsilon", "max_grad_norm", "num_train_epochs"), st.floats(1e-9, 1e9)),
    **dict.fromkeys(("seed", "max_length", "save_total_limit", "eval_pairs"), st.integers(1, 2**31)),
    **dict.fromkeys(("disable_dropout", "save_only_model", "use_weighting", "use_peft"), st.booleans()),
}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_value_is_the_same_from_yaml_and_command_line(recipe, data):
    key = data.draw(st.sampled_from(sorted(NUMBERS)))
    value = data.draw(NUMBERS[key])
    written = data.draw(st.sampled_from([repr(value), yaml.safe_dump(value).split("\n")[0], f"'{value}'"]))
    _, by_yaml = parse_training_args(*DPO, argv=recipe(f"{key}: {written}"))
    _, by_flag = parse_training_args(*DPO, argv=recipe("{}", f"--{key}", str(value)))
    assert by_yaml == by_flag, f"{key}: {written} in a recipe is {by_yaml[key]!r}, as a flag {by_flag[key]!r}"
    assert by_yaml[key] == value and type(by_yaml[key]) is type(value)
