"""docs/your-own-data.md: its forms of rows are read, its commands run unchanged in a fresh copy of the project."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from examples import CHATML, with_template
from running import ROOT

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_pairs

PAGE = (ROOT / "docs/your-own-data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("recipes", "scripts", "tinydpo", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (0, 0))  # a fresh checkout's are newer than .venv, and make would install from here
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


@pytest.mark.slow
def test_a_reader_gets_from_a_file_to_an_evaluated_policy(project: Path):
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("the page's commands need .venv, which `make install` makes")
    # What `make test-all ARGS=…` hands down to every make below it is not meant for these.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))}
    environment = inherited | {"PYTHONPATH": str(project)}
    out = ""
    for commands in COMMANDS:
        done = subprocess.run(
            ["bash", "-ec", commands], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"the page's commands fail:\n{commands}\n{done.stdout}\n{done.stderr}"
        out += done.stdout
    by_talks, by_texts = re.findall(r"^train: .*\n(?:.*\n)*?  tokens computed.*", out, re.MULTILINE)
    assert by_talks == by_texts, "the same pairs as conversations and as texts are not the same to the model"
    results = json.loads((project / "runs/mine/evaluation/eval_results.json").read_text())
    assert results["pairs"] == 50 and results["reward_accuracy"] > 0.7, f"DPO does not learn the pairs: {results}"
    assert results["reward_policy"] > results["reward_ref"] + 0.2, f"answers do not get friendlier: {results}"
    assert results["kl_per_sequence"] < 5, f"the policy has left its reference far behind: {results}"
    assert (project / "runs/mine/report.html").is_file()
    assert re.search(r"^sft .*\n(.*\n)*dpo ", out, re.MULTILINE), "neither model answers"


def test_the_recipe_of_a_reader_with_a_network_is_whole(project: Path):
    """What the other block makes: recipes that name the reader's file, model and folders and nothing of HH's."""
    other = re.search(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]
    subprocess.run(["bash", "-ec", other], cwd=project, check=True)
    recipes = {path.name: path.read_text() for path in (project / "recipes/mine").iterdir()}
    assert {"sft.yaml", "dpo.yaml", "evaluate.yaml"} <= set(recipes)
    for name, text in recipes.items():
        keys = dict(re.findall(r"^(\w+): (\S+)", text, re.MULTILINE))
        trained = name not in ("evaluate.yaml", "winrate.yaml", "frontier.yaml")  # these read the policy's own data
        assert keys.get("dataset_name") == ("my_pairs.jsonl" if trained else None), f"{name} reads other data"
        assert "dataset_revision" not in keys, f"{name} pins HH's revision"
        assert keys["model_name_or_path"].startswith("HuggingFaceTB/" if name == "sft.yaml" else "runs/mine/"), name


FORMS = re.findall(r"^\| (.+?) \| (SFT(?:, DPO)?) \| `(\{.+?\})` \|(?: `(.+?)` \|)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("form", FORMS, ids=[f"{i} {name}" for i, (name, *_) in enumerate(FORMS)])
def test_every_form_of_the_table_is_read(form: tuple[str, ...], tmp_path: Path, tiny_tokenizer: Any):
    name, stages, row, flags = form
    assert len(FORMS) == PAGE.count("| `{"), "a row of the tables is not tried here"
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(row + "\n")
    data = parse_args(DataArguments, argv=["--dataset_name", str(tmp_path), *shlex.split(flags)])[0]
    for stage in stages.split(", "):
        split = load_pairs(data, with_template(tiny_tokenizer, CHATML), 128, need_pairs=stage == "DPO")["train"]
        text = split.texts[0]
        assert "Curry?" in text["prompt"] and text["chosen"].strip() == "Gladly!", f"{name} ({stage}): read as {text}"
        rejected = (text["rejected"] or "").strip()
        assert rejected == ("Look it up." if "DPO" in stages else ""), f"{name} ({stage}): rejected is {rejected!r}"
        assert text["prompt"].count("Curry?") == 1, f"{name} ({stage}): the prompt is there twice"
        unread = {note for note in split.summary["notes"] if "is not read" in note}
        assert not unread, f"{name} ({stage}): {unread}"
        fitted = tiny_tokenizer.decode(split.pairs[0]["prompt_ids"] + split.pairs[0]["chosen_ids"])
        assert "Curry?" in fitted and "Gladly!" in fitted, f"{name} ({stage}): trained on {fitted!r}"
