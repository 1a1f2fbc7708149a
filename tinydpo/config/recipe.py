"""TRL's parser (YAML by `--config`, the command line wins) with its silences removed.

An unknown, misspelt or abbreviated key, or a value of the wrong type, is one sentence that names it.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from tinydpo.config import launch as machine
from tinydpo.config.arguments import PER_DATASET_FLAGS, DataArguments, as_list, resolve_row_length, unwrap_single
from tinydpo.errors import UserError
from tinydpo.run_folder import RunFolder

# A revision pinned in a recipe belongs to the recipe's own id: naming another id drops it.
REVISIONS = {
    "model_name_or_path": "model_revision",
    "ref_model_name_or_path": "ref_model_revision",
    "dataset_name": "dataset_revision",
}

COMMAND_LINE = "command line:"


class RecipeParser(TrlParser):
    """TRL's parser, strict: nothing is guessed, ignored or left for a later traceback."""

    def __init__(self, types: Iterable[type], ignored: Iterable[type] = (), defaults_from_run: str | None = None):
        """Take the flags from `types`; the YAML may hold those of `ignored` too, without effect."""
        super().__init__(list(types), allow_abbrev=False)
        self.defaults_from_run = defaults_from_run
        self.options = {}
        for action in self._actions:
            self.options.setdefault(action.dest, action)  # the first is the flag itself, a later one its --no_ twin
        self.admits = {key: _members(hint) for kind in types for key, hint in get_type_hints(kind).items()}
        for key, admits in self.admits.items():  # argparse's one type is not all that these fields take
            if dict in admits:
                self.options[key].type = partial(_mapping, key=key, decode=str not in admits)
            elif {str, bool} <= admits:
                self.options[key].type = _bool_or_text
        self.ignored = {f.name for kind in ignored for f in fields(kind)} - set(self.options)
        self.library_defaults = {name: action.default for name, action in self.options.items()}
        self.config_file, self.config, self.resolved = "", {}, {}

    def error(self, message: str) -> None:
        """Instead of argparse's usage dump."""
        raise UserError(f"{message}; --help lists every flag")

    def unknown(self, key: str, where: str) -> UserError:
        """The error for a key that is no flag."""
        known = [*self.admits, *self.ignored, *["config"] * (where == COMMAND_LINE)]
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        return UserError(f"{where} {key!r} is not a known key; the nearest valid one is {nearest!r}")

    def blame(self, message: str) -> str:
        """Put the key before a library's message that quotes its value only."""
        for key, value in self.resolved.items():
            if isinstance(value, str) and value != self.library_defaults[key] and repr(value) in message:
                return f"{key}: {message}"
        return message

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Check and convert the YAML's values as if they came from the command line (TRL takes them as they are)."""
        self.config = {key: self.convert(key, value) for key, value in config.items() if key not in self.ignored}
        return super().set_defaults_with_config(**self.config)

    def convert(self, key: str, value: Any) -> Any:
        """A YAML value as its flag would give it, or a UserError that names file and key."""
        if key not in self.admits:
            raise self.unknown(key, f"{self.config_file}:")
        action, admits = self.options[key], self.admits[key]
        try:
            if value is None and type(None) in admits:
                return None
            if isinstance(value, dict) and dict in admits:
                return action.type(json.dumps(value))
            if isinstance(value, list) and value and list in admits:
                return [_convert_one(action, admits, one) for one in value]
            converted = _convert_one(action, admits, value)
            return [converted] if action.nargs == "+" else converted
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(action.type, "__name__", "a mapping")  # partials have none
            kind = {"string_to_bool": "true or false", "str": "text"}.get(kind, kind)
            expected = f"one of {', '.join(map(str, action.choices))}" if action.choices else kind
            shown = "empty" if value is None else repr(value)
            many = "a list of " if action.nargs == "+" else ""
            raise UserError(f"{self.config_file}: {key} is {shown}, expected {many}{expected}") from None

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse what is unknown, drop a revision pinned for another id, and fill in what the user left unset."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if self.defaults_from_run:
            self.set_defaults(**self.read_run_defaults(namespace))
            namespace, unknown = super().parse_known_args(args)
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag.strip("-") and flag.startswith("-"):
                raise self.unknown(flag.lstrip("-").replace("-", "_"), COMMAND_LINE)
            raise UserError(f"{COMMAND_LINE} {flag!r} does not belong to any flag; values follow a --flag")
        flags = [arg[2:].split("=")[0].replace("-", "_") for arg in args or () if arg.startswith("--")]
        given = set(flags)
        for flag in ("column", "role"):
            if flags.count(flag) > 1:
                raise UserError(
                    f"{COMMAND_LINE} --{flag} is given twice; write its values after one, --{flag} A=B C=D"
                )
        for name, revision in REVISIONS.items():
            other = name in self.config and as_list(self.config[name]) not in (
                [],
                as_list(getattr(namespace, name, None)),
            )
            if other and revision in self.config and revision not in given:
                setattr(namespace, revision, self.library_defaults[revision])
        if "bf16" in self.options:  # a training script
            self.fill(namespace, given)
        for name in PER_DATASET_FLAGS:
            if isinstance(value := getattr(namespace, name, None), list):
                setattr(namespace, name, unwrap_single(value))  # alike from a recipe and from the command line
        self.resolved = dict(sorted(vars(namespace).items()))
        return namespace, unknown

    def read_run_defaults(self, namespace: argparse.Namespace) -> dict[str, Any]:
        """Settings of the run that made the model, where the recipe has none: budget, β, and its data.

        If other data is named, the run's data settings (its columns, its split) say nothing about it.
        """
        run = RunFolder.of_model(getattr(namespace, self.defaults_from_run) or "").read_config()
        named = as_list(namespace.dataset_name)
        names = ["max_length", "max_question_length", "beta"]
        if not named or named == as_list(run.get("dataset_name")):
            names += [field.name for field in fields(DataArguments)]
        return {
            name: run[name]
            for name in names
            if run.get(name) is not None and name in self.options and name not in self.config
        }

    def fill(self, namespace: argparse.Namespace, given: set[str]) -> None:
        """Fill what a training script's user left unset."""
        if namespace.output_dir is None:
            if not self.config_file:
                raise UserError("output_dir is not set; pass --output_dir, or --config with a recipe")
            recipe = Path(self.config_file).resolve()
            namespace.output_dir = f"runs/{recipe.parent.name}/{recipe.stem}"
        # transformers renamed these flags: TRL's default for the old name prints a warning at every start, and the old
        # name on the command line loses against the new one in a recipe.
        for end in ("", "_kwargs"):
            new, old = f"activation_checkpointing{end}", f"gradient_checkpointing{end}"
            old_wins = new not in given and {old, f"no_{old}"} & given
            if getattr(namespace, new) is None or old_wins:
                setattr(namespace, new, getattr(namespace, old))
            setattr(namespace, old, getattr(namespace, new))
        if "logging_nan_inf_filter" not in given | set(self.config):
            namespace.logging_nan_inf_filter = (
                False  # it hides NaN losses, and waits for the GPU twice a batch to do so
            )
        namespace.row_length = resolve_row_length(namespace.max_length or 0, namespace.row_length)
        machine.fill_defaults(namespace)


def parse_args(
    *types: type,
    argv: Sequence[str] | None = None,
    ignored: Iterable[type] = (),
    defaults_from_run: str | None = None,
) -> tuple:
    """Parse the command line and the `--config` YAML into one instance of each dataclass.

    Args:
        types: dataclasses whose fields are the flags.
        argv: arguments, by default the process's own.
        ignored: dataclasses whose fields the YAML may hold without effect (a training recipe read by another script).
        defaults_from_run: the flag that names a model; its run gives the defaults of data settings, max_length, beta.

    Raises:
        UserError: for an unknown key, a value of the wrong type or an unreadable YAML, named in one sentence.
    """
    return parse_training_args(*types, argv=argv, ignored=ignored, defaults_from_run=defaults_from_run)[0]


def parse_training_args(
    *types: type,
    argv: Sequence[str] | None = None,
    ignored: Iterable[type] = (),
    defaults_from_run: str | None = None,
) -> tuple[tuple, dict]:
    """`parse`, and beside it every key with the value that it came to (plain YAML values)."""
    argv = [part for arg in (sys.argv[1:] if argv is None else argv) for part in _split_config(arg)]
    parser = RecipeParser(types, ignored, defaults_from_run)
    if "--config" in argv:
        if argv.count("--config") > 1:
            raise UserError(f"{COMMAND_LINE} --config is given twice; give one recipe, and flags for what differs")
        parser.config_file = next(iter(argv[argv.index("--config") + 1 :]), "")
        load_recipe(parser.config_file)
    try:
        values = parser.parse_args_and_config(argv)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:  # the dataclasses' own checks
        raise UserError(parser.blame(str(error))) from None
    return tuple(values), parser.resolved


def load_recipe(path: str) -> dict[str, Any]:
    """A recipe's keys; one that cannot be read, or that PyYAML takes for something else than it seems, is refused."""
    if not Path(path).is_file():
        raise UserError(f"--config: there is no file {path!r}; recipes/ holds the recipes")
    try:
        with open(path, encoding="utf-8") as stream:
            config = yaml.load(stream, _OnceLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    for key in config:
        if not isinstance(key, str):
            raise UserError(f"{path}: {key!r} is not a known key; keys are the names of flags")
    if not isinstance(config.get("env", {}), dict):
        raise UserError(f"{path}: env is {config['env']!r}, expected a mapping of environment variables")
    return config


class _OnceLoader(yaml.SafeLoader):
    """A key that stands twice is an error: PyYAML takes the last, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _split_config(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--config=") else [arg]


def _members(hint: Any) -> set:
    """The types in a hint: `dict[str, int] | None` gives `{dict, NoneType}`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return {get_origin(kind) or kind for kind in kinds}


def _convert_one(action: argparse.Action, admits: set, value: Any) -> Any:
    """One YAML scalar; ValueError and its like if it is of the wrong type."""
    if isinstance(value, bool) and action.type is str:
        if action.const is True or Literal in admits:  # a text or this very bool
            return value
        raise ValueError
    if value is False and "no" in (action.choices or ()):
        value = "no"  # YAML reads a bare no as false
    if value is None or isinstance(value, (dict, list)):
        raise ValueError
    converted = (action.type or str)(str(value))
    if action.choices is not None and converted not in action.choices:
        raise ValueError
    return converted


def _mapping(text: str, key: str, decode: bool) -> Any:
    """Check JSON here, where the flag has a name; transformers decodes it in the fields that may be text too."""
    text = text.strip()
    if not (text.startswith("{") or decode or key.endswith("_kwargs")):
        return text  # the path of a file
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON mapping")
    return value if decode else text


def _bool_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)
