"""Recipes and the command line: every flag of TRL's, strict, the command line wins, one sentence for a mistake."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from running import ROOT
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig

from tinydpo.config.arguments import DataArguments, ReferenceArguments, RunArguments
from tinydpo.config.flags import check_flags
from tinydpo.config.recipe import parse_args, parse_training_args
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation.arguments import EvaluateArguments, RewardArguments, RoundArguments
from tinydpo.evaluation.frontier import FrontierArguments
from tinydpo.evaluation.judge import JudgeArguments
from tinydpo.evaluation.on_policy import PairsArguments
from tinydpo.evaluation.winrate import WinrateArguments

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
    [("learning_rat", "learning_rate"), ("pair_per_step", "pairs_per_step"),  # argparse takes the first silently
     ("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch_size", "per_device_train_batch_size")],
)  # fmt: skip
def test_an_unknown_key_is_named_with_the_nearest(recipe, key: str, nearest: str):
    for message in (mistake(recipe({key: 1})), mistake([f"--{key.replace('_', '-')}=1"])):
        assert repr(key) in message and repr(nearest) in message, message
    for key in ("zzz", "padding_fre"):  # the second is nearest to a flag that is refused
        assert "did you mean" not in mistake(recipe({key: 1})), "a suggestion that does not help"
    assert "unexpected argument 'stray'" in mistake(["stray"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: fast", "float"),
        ("learning_rate:", "float"),
        ("beta: {a: 1}", "float"),
        ("eval_strategy: sometimes", "'no', 'steps', 'epoch'"),
        ("loss_type: []", "at least one"),
    ],
)
def test_a_value_of_the_wrong_type_names_file_and_key(recipe, text: str, expected: str):
    message = mistake(recipe(text))
    assert "recipe.yaml: " in message and text.split(":")[0] in message, f"file and key are not named: {message}"
    assert expected in message, f"the message does not say what is wrong: {message}"


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--model_init_kwargs", "{a"], "--model_init_kwargs"),
        (["--test_split_size", "2"], "test_split_size"),
        (["--max_train_pairs", "0"], "max_train_pairs must be at least 1"),
        (["--column", "question"], "column"),
        (["--row_length", "9"], "row_length"),
        (["--bf16", "true", "--fp16", "true"], "fp16"),
    ],
)
def test_a_bad_value_on_the_command_line_names_the_flag(argv: list[str], flag: str):
    assert flag in mistake(["--output_dir", "out", *argv])


@pytest.mark.parametrize(
    ("arguments", "flag", "value"),
    [(EvaluateArguments, "num_prompts", "0"), (FrontierArguments, "best_of", "0"), (RoundArguments, "rounds", "0"),
     (PairsArguments, "held_out_prompts", "64"), (JudgeArguments, "judge_concurrency", "0")],
)  # fmt: skip
def test_a_count_that_makes_no_sense_is_named(arguments: type, flag: str, value: str):
    """Before sampling or training, after which it would be a traceback."""
    needed = {"model_name_or_path": "m", "output_dir": "o", "dpo_config": "c", "recipe": "r", "judge_base_url": "http://j",
              "judge_model": "j"}  # fmt: skip
    keys = {field.name for field in fields(arguments)} & needed.keys()
    argv = [word for key in keys for word in (f"--{key}", needed[key])]
    with pytest.raises(UserError, match=f"{flag} (must be at least 1|is a share between 0 and 1)"):
        parse_args(arguments, argv=[*argv, f"--{flag}", value])


def test_a_mistake_exits_with_one_line_and_no_traceback(recipe, capsys):
    with pytest.raises(SystemExit) as caught, report_errors():
        parse_args(*DPO, argv=recipe("a: [\nb: c"))
    out, err = capsys.readouterr()
    assert caught.value.code == 1, "a mistake must not look like success to make or a shell script"
    assert err.startswith("error: ") and err.count("\n") == 1 and not out, f"not one line: {err!r}"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("learning_rate: 5e-5", "learning_rate", 5e-5),  # text in YAML 1.1
        ("loss_type: sigmoid", "loss_type", ["sigmoid"]),
        ("eval_strategy: no", "eval_strategy", "no"),  # a bare no is false in YAML 1.1
        ("disable_dropout: off", "disable_dropout", False),
        ("max_length: null", "max_length", None),  # and not the default, 1024
        ("run_name: -x", "run_name", "-x"),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("report_to: none", "report_to", []),
        ("model_init_kwargs: {attn_implementation: eager}", "model_init_kwargs", {"attn_implementation": "eager"}),
    ],
)
def test_yaml_values_come_out_as_meant(recipe, text: str, key: str, value: object):
    _, _, training, _ = parse_args(*DPO, argv=recipe(text))
    got = getattr(training, key)
    assert getattr(got, "value", got) == value, f"{text!r} trains with {key} {got!r}"


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", "1.5e-05"), ("dataset_name", "a"), ("report_to", "none"), ("model_init_kwargs", '{"a": 1}')],
)
def test_a_value_is_the_same_from_a_recipe_and_the_command_line(recipe, key: str, value: str):
    _, by_recipe = parse_training_args(*DPO, argv=recipe(f"{key}: {value}"))
    _, by_flag = parse_training_args(*DPO, argv=recipe("{}", f"--{key}", value))
    assert by_recipe == by_flag, "the same run would not be recognised as the same"


def test_the_home_folder_is_the_same_in_every_script(recipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"model_name_or_path": "~/dpo", "ref_model_name_or_path": "~/sft", "dataset_name": ["~/a", "~/b"]}
    args, data = parse_args(EvaluateArguments, DataArguments, argv=recipe(given, "--output_dir=~/out"))
    models = (args.model_name_or_path, args.ref_model_name_or_path)
    assert models == ("/home/me/dpo", "/home/me/sft"), "training and evaluation read different folders"
    assert (data.dataset_name, args.output_dir) == (["/home/me/a", "/home/me/b"], "/home/me/out")


def test_the_command_line_wins(recipe):
    argv = recipe("beta: 0.1\nseed: 1\nloss_type: [ipo]\nuse_cpu: true\neval_pairs: 7\nmodel_name_or_path: here\n")
    more = ["--beta", "0.3", "--seed=2", "--loss_type", "sigmoid", "sft", "--model_name_or_path", "there"]
    _, run, training, model = parse_args(*DPO, argv=[*more, *argv])
    assert (training.beta, training.seed, training.loss_type) == (0.3, 2, ["sigmoid", "sft"])
    assert (run.eval_pairs, model.model_name_or_path) == (7, "there")


@pytest.mark.parametrize(
    ("name", "revision", "unpinned"),
    [
        ("model_name_or_path", "model_revision", "main"),
        ("ref_model_name_or_path", "ref_model_revision", None),
        ("dataset_name", "dataset_revision", None),
    ],
)
def test_a_pinned_revision_belongs_to_its_own_id(recipe, name: str, revision: str, unpinned: str | None):
    def parsed(*more: str) -> str | None:
        argv = recipe({name: "org/own", revision: "abc"}, *more)
        return parse_training_args(*DPO, ReferenceArguments, argv=argv)[1][revision]

    assert parsed() == "abc", "the recipe's pinned revision is not used"
    assert parsed(f"--{name}", "org/own") == "abc", "naming the recipe's own id again drops its revision"
    assert parsed(f"--{name}", "org/other") == unpinned, "a different id would be looked up at this one's commit"
    assert parsed(f"--{revision}", "def") == "def", "the command line does not win"


def test_a_recipes_dataset_keys_belong_to_its_dataset(recipe):
    keys = {"dataset_name": "org/own", "dataset_data_dir": "part", "column": ["a=prompt"], "role": ["gpt=assistant"]}
    assert parse_args(DataArguments, argv=recipe(keys))[0].dataset_data_dir == "part"
    (data,) = parse_args(DataArguments, argv=recipe(keys, "--dataset_name", "other.jsonl", "--column", "q=prompt"))
    assert (data.dataset_data_dir, data.column, data.role) == (None, ["q=prompt"], None)
    del keys["dataset_name"]
    (data,) = parse_args(DataArguments, argv=recipe(keys, "--dataset_name", "any.jsonl"))
    assert data.column == ["a=prompt"], "a recipe without a dataset describes the one on the command line"


def test_an_unreadable_recipe_is_named(recipe):
    assert "no recipe missing.yaml" in mistake(["--config", "missing.yaml"])
    for text in ("beta: [", "- beta", "beta: 0.1\nseed: 1\nbeta: 0.2"):
        assert "recipe.yaml" in mistake(recipe(text)), f"{text!r}: the file is not named"


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers' about the old name, at every start
@pytest.mark.parametrize(
    ("text", "argv", "on"),
    [
        ("{}", [], True),  # TRL's default
        ("activation_checkpointing: false", ["--gradient_checkpointing", "true"], True),
        ("activation_checkpointing: true", ["--no_gradient_checkpointing"], False),
    ],
)
def test_both_names_of_activation_checkpointing_work(recipe, text: str, argv: list[str], on: bool):
    (_, _, training, _), resolved = parse_training_args(*DPO, argv=recipe(text, *argv))
    assert training.activation_checkpointing is on, f"{text} and {argv} train with it {'off' if on else 'on'}"
    assert resolved["activation_checkpointing"] is resolved["gradient_checkpointing"] is on


def test_output_dir_follows_the_recipe_and_env_is_set(recipe, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TINYDPO_TEST", "old")
    parse_args(*DPO, argv=recipe({"env": {"TINYDPO_TEST": 1}}))
    assert os.environ["TINYDPO_TEST"] == "1", "TRL's `env` key has no effect"
    assert parse_args(*DPO, argv=recipe({}))[2].output_dir == f"runs/{tmp_path.name}/recipe"
    assert parse_args(*DPO, argv=recipe({}, "--output_dir", "there"))[2].output_dir == "there"
    assert "output_dir" in mistake([])


STAGES = {
    "sft": SFT, "dpo": DPO, "reward": REWARD, "winrate": (WinrateArguments, JudgeArguments, DataArguments),
    "evaluate": (EvaluateArguments, RewardArguments, DataArguments),
    "frontier": (FrontierArguments, RewardArguments, DataArguments),
    "pairs": (PairsArguments, RewardArguments, DataArguments),
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_recipe_parses(path: Path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not {"bf16", "fp16", "use_cpu"} & set(keys), "recipes leave precision and device to the scripts"
    stage = path.stem.split("-")[0]
    judge = ["--judge_model", "m", "--judge_base_url", "http://host/v1"] if stage == "winrate" else []
    parsed, settings = parse_training_args(*STAGES[stage], argv=["--config", str(path), *judge])
    for key, value in keys.items():
        if key not in ("per_device_train_batch_size", "report_to", "judge_base_url"):
            holder = next(part for part in parsed if hasattr(part, key))
            got = getattr(holder, key)
            assert getattr(got, "value", got) == value, f"{path.name} says {key}: {value}, and {got!r} is used"
    if STAGES[stage] in (SFT, DPO, REWARD):
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        assert keys.get("pairs_per_step", batch) == batch
        check_flags(stage, settings, *STAGES[stage][2:])


def test_another_script_may_read_a_training_recipe():
    argv = ["--config", str(ROOT / "recipes/gpt2-medium-hh/sft.yaml")]
    assert parse_args(DataArguments, argv=argv, ignored=SFT[1:])[0].dataset_name == "Anthropic/hh-rlhf"


@pytest.fixture
def policy(tmp_path: Path) -> list[str]:
    """Flags that name a policy whose run has settings of its own."""
    settings = {"dataset_name": "org/own", "dataset_train_split": "part[:9]",
                "dataset_revision": "abc", "test_split_size": 0.2, "column": ["a=prompt"],
                "chat": True, "shared_prefix": False, "max_length": 96, "beta": 0.4, "seed": 7, "bf16": False,
                "dtype": "bfloat16",
                "model_name_or_path": "org/start", "model_revision": "def"}  # fmt: skip
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "run_config.yaml").write_text(yaml.safe_dump(settings))
    return ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "e")]


def evaluated(argv: list[str]) -> tuple[EvaluateArguments, DataArguments]:
    return parse_args(EvaluateArguments, DataArguments, argv=argv, defaults_from_run="model_name_or_path")


def test_a_policys_run_gives_the_defaults(policy):
    args, data = evaluated(policy)
    assert (data.dataset_name, data.dataset_revision, data.test_split_size) == ("org/own", "abc", 0.2)
    assert (args.max_length, args.beta, data.column) == (96, 0.4, ["a=prompt"])
    assert args.models["ref"] == ("org/start", "def"), "compared with a model that the policy did not start from"
    assert data.chat, "a policy that was trained on messages is evaluated on texts"
    assert not args.shared_prefix, "a model that cannot be packed is evaluated in packed rows"
    assert args.dtype == "float32", "it is evaluated in another precision than it was trained in"
    assert evaluated([*policy, "--dtype", "auto"])[0].dtype == "auto"
    assert args.seed == 0, "more than the data settings comes from the run"
    policy[1] += "/checkpoint-3"
    assert evaluated(policy)[1].test_split_size == 0.2, "a checkpoint does not belong to its run"
    policy[1] = "org/hub-model"
    assert evaluated([*policy, "--ref_model_name_or_path", "org/start"])[1].test_split_size == 0.05, (
        "a model without a run changes a default"
    )


def test_another_reference_is_named(policy):
    assert evaluated(policy)[0].describe_reference() == ""
    line = evaluated([*policy, "--ref_model_name_or_path", "org/sft"])[0].describe_reference()
    assert "org/sft" in line and "that of the run was org/start" in line, (
        "KL and rewards look like those of the training"
    )


def test_recipe_and_command_line_win_over_the_policys_run(policy, recipe):
    args, data = evaluated([*policy, *recipe({"max_length": 64, "test_split_size": 0.3}), "--test_split_size", "0.4"])
    assert (args.max_length, data.test_split_size, args.beta) == (64, 0.4, 0.4)
    _, data = evaluated([*policy, *recipe({"dataset_name": "org/other"}), "--dataset_name", "org/own"])
    assert (data.dataset_revision, data.column) == ("abc", ["a=prompt"]), "the run's own dataset is not read its way"
    _, data = evaluated([*policy, "--dataset_name", "org/other"])
    assert (data.dataset_revision, data.column, data.dataset_train_split) == (None, None, "part"), (
        "the run's dataset lends its columns or its slice to a different one"
    )
    assert data.test_split_size == 0.2
