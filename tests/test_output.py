"""What a command writes: into its own folder only, known before it computes, and on every terminal."""

import importlib
import io
import sys
from pathlib import Path

import datasets.config
import evaluate
import pytest
from running import ROOT

from tinydpo.config.arguments import DataArguments
from tinydpo.data.splits import load_rows
from tinydpo.errors import UserError, report_errors
from tinydpo.files import write_json

POLICY = ["--model_name_or_path", "no/policy"]  # what is refused after loading it would be this
MODELS = [*POLICY, "--ref_model_name_or_path", "no/reference"]
COMMANDS = {
    "sft": POLICY,
    "merge": POLICY,
    "sample_pairs": POLICY,
    "evaluate": MODELS,
    "winrate": [*MODELS, "--judge_model", "judge", "--judge_base_url", "http://127.0.0.1:9"],
    "frontier": [*POLICY, "--dpo_config", str(ROOT / "recipes/quickstart/dpo.yaml")],
    "round": [*POLICY, "--recipe", str(ROOT / "recipes/quickstart"), "--dataset_name", "no/data"],
    "quickstart": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_replaces_no_files_of_others(command: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for folder, error in (
        ("data", "holds train.jsonl"),
        ("data/train.jsonl", "written to"),
        ("dangling", "written to"),
    ):
        with pytest.raises(UserError, match=error):
            importlib.import_module(command).main([*COMMANDS[command], "--output_dir", str(tmp_path / folder)])
    assert (tmp_path / "data/train.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["dangling", "data", "train.jsonl"]


@pytest.mark.parametrize("command", ["evaluate", "winrate", "frontier"])
def test_a_report_replaces_no_page_of_others(command: str, tmp_path: Path):
    (tmp_path / "report.html").write_text("<title>Annual report</title>")
    with pytest.raises(UserError, match=r"report\.html is not a report of tinydpo"):
        importlib.import_module(command).main([*COMMANDS[command], "--output_dir", str(tmp_path / "out")])


def test_what_a_file_system_refuses_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end, report_errors():
        write_json(tmp_path / "missing/results.json", {})
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/missing/results.json: No such file or directory\n"


def test_a_cache_that_cannot_be_made_is_not_blamed_on_the_data(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
    with pytest.raises(SystemExit), report_errors():
        load_rows(DataArguments(dataset_name=str(task / "data")))
    assert capsys.readouterr().err == f"error: {tmp_path}/file/cache: Not a directory\n"


def test_a_terminal_without_utf8_ends_no_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    with pytest.raises(SystemExit) as end, report_errors():
        evaluate.main(["--help"])
    assert end.value.code == 0 and b"\\u03b2 of the implicit reward" in sys.stdout.buffer.getvalue()
