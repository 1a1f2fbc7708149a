"""Links of the documentation lead somewhere, and its commands are ones that their scripts accept."""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, call

from tinydpo.errors import UserError

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/*.md")]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
# What a reader makes on the way, and what stands for it here.
MADE = {
    "recipes/mine": "recipes/quickstart",
    "recipes/proxy": "recipes/quickstart",
    "runs/gpt2-medium-hh/dpo/run_config.yaml": "recipes/gpt2-medium-hh/dpo.yaml",
}


class Parsed(Exception):
    """The script has accepted its flags."""


def find_commands(page: Path) -> Iterator[list[str]]:
    """The commands in a page's shell blocks, or in a recipe's header."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        rows = "\n".join(re.findall(r"^\| (`\w+=.*?`) \|", text, re.MULTILINE))  # README's table of things to change
        lines += [f"make dpo {change}" for change in re.findall(r"`(\w+=.*?)`", rows)]
    else:
        lines = [re.split(r"\s{3,}", line)[0] for line in re.findall(r"^#   (.*)", text, re.MULTILINE)]
    for line in lines:
        for made, stand_in in MADE.items():
            line = line.replace(made, stand_in)
        command = re.sub(r"^R=\S+; ", "", re.sub(r"\$\w+", "FOLDER", line))
        if (
            re.match(r"(make|python|\.venv/bin/(python|accelerate)|accelerate|sbatch)\s", command)
            and " - <<" not in line
        ):
            yield shlex.split(command, comments=True)


def stop_after(parse: Callable) -> Callable:
    def parse_and_stop(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    return parse_and_stop


def check_flags(words: list[str]) -> None:
    """Have a script parse the flags of `[…] scripts/<name>.py <flags>`, and stop it there."""
    place = next((i for i, word in enumerate(words) if re.fullmatch(r"(scripts|benchmarks)/\w+\.py", word)), None)
    if place is None or words[place].endswith(("quickstart.py", "report.py", "make_pairs.py")):
        return  # `make test` and the like, and two scripts with one flag each
    script = importlib.import_module(Path(words[place]).stem)
    with pytest.MonkeyPatch.context() as patch:
        for name in {"parse_args", "parse_training_args"} & set(vars(script)):
            patch.setattr(script, name, stop_after(getattr(script, name)))
        with pytest.raises(Parsed):
            script.main(words[place + 1 :])


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for command in find_commands(page):
        if command[0] == "make":
            printed = call("make", "-n", *command[1:])  # prints what it would run
            assert printed.returncode == 0, f"{page.name}: {shlex.join(command)}: {printed.stderr}"
            commands = [
                shlex.split(line) for line in printed.stdout.splitlines() if re.search("scripts|benchmarks", line)
            ]
        else:
            commands = [command]
        for words in commands:
            try:
                check_flags(words)
            except UserError as error:
                pytest.fail(f"{page.name}: {shlex.join(command)}: {error}")


def find_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name} links to {link}, which is not there"
            assert not anchor or anchor in find_anchors(target), (
                f"{page.name} links to {link}#{anchor}: no such heading"
            )


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file in re.findall(r"`((?:\w+/)*\w+\.py)[`:]", text):
        folder = next(
            (folder for folder in (ROOT, ROOT / "tinydpo", ROOT / "tests") if (folder / file).is_file()), None
        )
        assert folder, f"CONTRIBUTING.md names {file}, which is not there"
    way = text.partition("<!-- a row's way -->")[2].partition("\n## ")[0]
    code = ""
    for step in way.split("\n"):
        names = re.findall(r"`(?:([\w/]+\.py): )?([\w.]+)`", step)
        for file, name in names:
            if file:
                folder = ROOT if file.startswith("scripts/") else ROOT / "tinydpo"
                code = (folder / file).read_text(encoding="utf-8")
            if name.endswith(".py") or name.startswith("DPOTrainer") or name == "max_length":
                continue
            for part in name.split("."):
                assert re.search(rf"(def|class) {part}\b", code), f"CONTRIBUTING.md names {name}, which is not there"
