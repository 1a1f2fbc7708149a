"""From a recipe and the command line to dataclasses, strictly.

A recipe is a YAML file whose keys are flags. Its values are converted as if they were on the command line, which
wins over it. An unknown, misspelt or abbreviated key, or a value of the wrong type, is one sentence that names it.
"""

import json
import os
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from tinydpo.config import launch
from tinydpo.config.arguments import DataArguments, as_list, get_reference, get_split_name, resolve_row_length
from tinydpo.config.flags import FIRST_FLAGS, list_refused_flags, suggest_flag
from tinydpo.errors import UserError
from tinydpo.files import read_yaml
from tinydpo.run_folder import RunFolder, was_trained_on_chat

# Settings that describe one model or dataset: if the command line names a different one, a recipe's are dropped.
DATASET_KEYS = {"dataset_config", "dataset_revision", "dataset_data_dir", "dataset_weights", "column", "role"}
KEYS_OF_SOURCE = {
    "model_name_or_path": {"model_revision"},
    "ref_model_name_or_path": {"ref_model_revision"},
    "dataset_name": DATASET_KEYS,
}


def parse_args(*types: type, **options: Any) -> tuple:
    """`parse_training_args` without the settings: one instance of each dataclass."""
    return parse_training_args(*types, **options)[0]


def parse_training_args(
    *types: type,
    argv: Sequence[str] | None = None,
    ignored: Iterable[type] = (),
    defaults_from_run: str | None = None,
) -> tuple[tuple, dict[str, Any]]:
    """Parse the command line and the `--config` recipe: one instance of each dataclass, and every key with its value.

    Args:
        types: dataclasses whose fields are the flags.
        argv: arguments, by default the process's own.
        ignored: dataclasses whose keys a recipe may hold without effect (a training recipe read by another script).
        defaults_from_run: a flag that names a model. If that is a local run's, the run's data settings, `max_length`,
            `beta`, `shared_prefix`, precision and reference are the defaults here.
    """
    parser = _StrictParser(types)
    command_line = parser.parse_given(argv)
    path = command_line.pop("config", None)
    recipe = {} if path is None else parser.parse_recipe(path, ignored)
    for name, keys in KEYS_OF_SOURCE.items():
        if name in recipe and name in command_line and as_list(recipe[name]) != as_list(command_line[name]):
            recipe = {key: value for key, value in recipe.items() if key not in keys}
    given = recipe | command_line
    from_run = _read_run_defaults(given, parser.defaults, given.get(defaults_from_run))
    settings = parser.defaults | from_run | given
    try:
        if parser.is_training:
            _fill_training_settings(settings, path, command_line)
        return parser.parse_dict(settings), settings
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:  # the dataclasses' own checks
        raise UserError(str(error)) from None


class _StrictParser(HfArgumentParser):
    """transformers' parser, without abbreviations, and with a `UserError` in place of a usage dump."""

    def __init__(self, types: Iterable[type]):
        super().__init__(
            list(types),
            allow_abbrev=False,
            usage="%(prog)s [--config RECIPE] [--flag VALUE ...]",
            description=sys.modules["__main__"].__doc__,  # a script's says what it does, with an example
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--config", help="A recipe: a YAML file whose keys are these flags.")
        self.source = "command line"
        self.kinds = {key: _get_kinds(hint) for kind in types for key, hint in get_type_hints(kind).items()}
        for action in self._actions:  # HfArgumentParser takes only one type of a union
            kinds = self.kinds.get(action.dest, set())
            if dict in kinds:
                action.type = _parse_json_mapping
            elif {str, list} <= kinds:
                action.nargs = "+"
        self.defaults = vars(self.parse_known_args([])[0])
        del self.defaults["config"]
        if "logging_nan_inf_filter" in self.defaults:
            self.defaults["logging_nan_inf_filter"] = False  # it hides NaN losses, and waits for the GPU each batch
        self.is_training = "bf16" in self.defaults
        if self.is_training:  # with the libraries' flags --help would be a thousand lines
            self.add_argument("--help-all", action="help", help="All flags, also the libraries'.")

    def error(self, message: str) -> None:
        raise UserError(f"{self.source}: {message}; see --help")

    def format_help(self) -> str:
        """The help without refused flags; a training script's `--help` has only those that most runs set."""
        shown = self.defaults.keys() - list_refused_flags(self.defaults)
        if self.is_training and "--help-all" not in self.argv:
            shown &= set(FIRST_FLAGS)
        for action in self._actions:
            is_opposite = action.option_strings[0].startswith("--no_")
            if action.dest not in shown | {"config", "help", "help_all"} or is_opposite:
                action.help = SUPPRESS
        return super().format_help()

    def parse_given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The flags that `argv` sets, without the defaults of the others."""
        self.argv = sys.argv if argv is None else argv
        unset = object()
        namespace = Namespace(**dict.fromkeys([*self.defaults, "config"], unset))
        namespace, rest = self.parse_known_args(argv, namespace)
        if rest and rest[0].startswith("-"):
            self.refuse_key(rest[0].split("=")[0].lstrip("-").replace("-", "_"))
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        given = {key: _expand_home(value) for key, value in vars(namespace).items() if value is not unset}
        for key, value in given.items():
            if {str, list} <= self.kinds.get(key, set()) and len(value) == 1:
                given[key] = value[0]  # as recipes write it
        return given

    def parse_recipe(self, path: str, ignored: Iterable[type]) -> dict[str, Any]:
        """A recipe's values as their flags would give them; its `env` goes into the environment."""
        self.source = path
        if not Path(path).is_file():
            folder = Path(path).parent
            others = sorted(other.stem for other in folder.glob("*.yaml"))
            hint = f"{folder} has {', '.join(others)}" if others else "check --config (make: RECIPE and STAGE)"
            raise UserError(f"there is no recipe {path}; {hint}")
        recipe = read_yaml(path)
        os.environ.update({name: str(value) for name, value in (recipe.pop("env", None) or {}).items()})
        skipped = {field.name for kind in ignored for field in fields(kind)}
        values = {}
        for key, value in recipe.items():
            if key in self.defaults and value is None and type(None) in self.kinds[key]:
                values[key] = None
            elif key in self.defaults:
                values |= self.parse_given(self.to_argv(key, value))
            elif key not in skipped:
                self.refuse_key(str(key))
        return values

    def to_argv(self, key: str, value: Any) -> list[str]:
        """A recipe's key as a flag on the command line."""
        if isinstance(value, list):
            return [f"--{key}", *map(str, value)]
        if isinstance(value, dict):
            return [f"--{key}={json.dumps(value)}"]
        if value is False and key.endswith("_strategy"):
            return [f"--{key}=no"]  # YAML reads a bare no as false
        return [f"--{key}={value}"]

    def refuse_key(self, key: str) -> None:
        near = suggest_flag(key, [*self.defaults, "config"])
        hint = f"did you mean {near!r}?" if near else "see --help"
        raise UserError(f"{self.source}: {key!r} is not a known key; {hint}")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description's lines as they are."""


def _get_kinds(hint: Any) -> set:
    """The types in a hint: `dict[str, int] | None` gives `{dict, NoneType}`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return {get_origin(kind) or kind for kind in kinds}


def _expand_home(value: Any) -> Any:
    """A path with its `~`, which a shell expands on some command lines only, as the home folder."""
    if isinstance(value, list):
        return [_expand_home(one) for one in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _parse_json_mapping(text: str) -> str | dict[str, Any]:
    return json.loads(text) if text.startswith("{") else text


def _read_run_defaults(given: dict[str, Any], known: dict[str, Any], model: str | None) -> dict[str, Any]:
    """The settings of the run that made a local model which `parse_training_args` names, as far as they are flags."""
    config = RunFolder.of_model(model).read_config() if model else {}
    if not config:
        return {}
    config["dtype"] = launch.get_dtype(config)  # in training, `dtype` is that of the weights
    keys = {field.name for field in fields(DataArguments)} | {"max_length", "beta", "dtype", "shared_prefix"}
    if as_list(given.get("dataset_name", config.get("dataset_name"))) != as_list(config.get("dataset_name")):
        keys -= DATASET_KEYS
        config["dataset_train_split"] = get_split_name(config.get("dataset_train_split", "train"))
        config["chat"] = was_trained_on_chat(model)  # on-policy pairs are messages already, other data may be texts
    defaults = {key: config[key] for key in keys & set(known) if config.get(key) is not None}
    if "ref_model_name_or_path" in known and "ref_model_name_or_path" not in given:
        defaults["ref_model_name_or_path"], defaults["ref_model_revision"] = get_reference(config)
    return defaults


def _fill_training_settings(settings: dict[str, Any], path: str | None, command_line: dict[str, Any]) -> None:
    """Fill in what a training script's user left unset."""
    if settings["output_dir"] is None:
        if path is None:
            raise UserError("output_dir is not set; pass --output_dir, or --config with a recipe")
        recipe = Path(path).resolve()
        settings["output_dir"] = f"runs/{recipe.parent.name}/{recipe.stem}"
    # transformers renamed these flags: TRL's default for the old name prints a warning at every start, and the old
    # name on the command line would lose against the new one in a recipe.
    for end in ("", "_kwargs"):
        new = f"activation_checkpointing{end}"
        old = f"gradient_checkpointing{end}"
        old_wins = old in command_line and new not in command_line
        if settings[new] is None or old_wins:
            settings[new] = settings[old]
        settings[old] = settings[new]
    settings["row_length"] = resolve_row_length(settings["max_length"] or 0, settings["row_length"])
    launch.fill_defaults(settings)
