"""Several stages in one process: the SFT model that a recipe starts from is trained if it is missing."""

import argparse
import gc
import importlib
import shlex
from pathlib import Path

from tinydpo.config.arguments import as_list
from tinydpo.errors import UserError, get_rank
from tinydpo.files import read_yaml
from tinydpo.run_folder import RunFolder


def get_config_path(argv: list[str] | None) -> str | None:
    """The value of --config on a command line, by default this process's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(argv)[0].config


def train_missing_model(
    model_name_or_path: str | None,
    config_path: str | None,
    accelerate_config: str | None = None,
    dataset_name: str | list[str] | None = None,
) -> bool:
    """Train a missing start model in this process, if a recipe beside `config_path` is known to make it.

    For recipes/x/dpo.yaml, the model runs/x/sft is made by recipes/x/sft.yaml, and runs/x/sft-512 by sft-512.yaml. An
    unfinished run is resumed with its own settings. Any other model is not touched. All processes of a launch call
    this together.

    Args:
        model_name_or_path: the model that the command starts from.
        config_path: the command's own recipe.
        accelerate_config: passed on to the SFT run, which gets no other flag of the command.
        dataset_name: the command's data. If no recipe has them, nothing is trained.

    Returns:
        Whether it trained. A training script must then parse its arguments again: they hold the state of the
        processes, which the SFT's trainer has replaced.

    Raises:
        UserError: the toy task's model is missing, which no recipe alone can make, or the model is missing and the
            command names other data, on which the user may want SFT or none.
    """
    from accelerate.utils import broadcast_object_list

    if not model_name_or_path or not config_path:
        return False
    model = Path(model_name_or_path)
    recipe = Path(config_path).with_name(f"{model.name}.yaml")
    recipe_name = recipe.resolve().parent.name
    if model.parts != ("runs", recipe_name, model.name) or not model.name.startswith("sft") or not recipe.is_file():
        return False
    run = RunFolder(model)
    is_plain_model = not run.is_started and any(model.glob("*.safetensors"))
    missing = not run.is_finished and not is_plain_model
    if not broadcast_object_list([missing])[0]:  # the first process decides: machines may not share the folder
        return False
    if recipe_name == "quickstart":
        raise UserError(f"{model} does not exist or is not finished; `make quickstart` makes it, with its data")
    known = [set(as_list(read_yaml(path).get("dataset_name"))) for path in (config_path, recipe)]
    if dataset_name and set(as_list(dataset_name)) not in known and not run.is_started:
        names = " ".join(as_list(dataset_name))
        raise UserError(
            f"{model} does not exist; start from another model with --model_name_or_path, or train this one first, "
            f'with the same data flags: make sft RECIPE={recipe.parent} ARGS="--dataset_name {names}"'
        )
    argv = ["--config", str(recipe)]
    state = "missing"
    if run.is_started:  # maybe with flags beside the recipe
        argv = ["--config", str(run.config_file), "--output_dir", str(model)]
        state = "unfinished"
    if not get_rank():
        start = read_yaml(argv[1])
        data = ", ".join(as_list(start.get("dataset_name")))
        print(
            f"{model} is {state}: first training {start.get('model_name_or_path')} on {data} with {argv[1]} "
            "(this command's flags do not apply to it)."
        )

    import sft

    if accelerate_config:
        argv += ["--accelerate_config", accelerate_config]
    sft.main(argv)
    gc.collect()  # model and optimizer refer to each other
    return True


def run_script(name: str, *argv: object) -> None:
    """Print a script's command and run it in this process."""
    words = [str(word) for word in argv]
    print(f"\n$ .venv/bin/python scripts/{name}.py {shlex.join(words)}", flush=True)
    importlib.import_module(name).main(words)
    gc.collect()  # a trainer's model and optimizer refer to each other


def suggest_command(target: str, model: str, reference: str = "") -> str:
    """The `make` command for a model in runs/<recipe folder>/<name>; where no such recipe is, the script's.

    `reference` is passed on if the model has no run that names it.
    """
    folder = Path(model)
    recipe = Path("recipes") / folder.parent.name
    if folder.parts != ("runs", recipe.name, folder.name) or not (recipe / "evaluate.yaml").is_file():
        command = f".venv/bin/python scripts/{target}.py --model_name_or_path {model} --output_dir {model}-evaluation"
        if reference and not RunFolder.of_model(model).is_started:
            command += f" --ref_model_name_or_path {reference}"
        return command
    name = "" if folder.name == "dpo" else f" NAME={folder.name}"
    return f"make {target} RECIPE={recipe}{name}"


def end_processes() -> None:
    """Leave the group of processes, at the very end of a script: they could not form a second group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
