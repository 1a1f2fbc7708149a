"""Models and data by their real ids and revisions, from a stand-in Hub on 127.0.0.1; failures are one sentence."""

import gzip
import importlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Handler, HubError, Server
from peft import LoraConfig, get_peft_model
from running import ROOT, run
from safetensors.torch import load_file, save_file
from toys import write_reward_model

from tinydpo.data.splits import FILE_SUFFIXES
from tinydpo.errors import UserError
from tinydpo.models.hub import download_dataset
from tinydpo.models.loading import load_model, load_tokenizer
from tinydpo.run_folder import RunFolder
from tinydpo.training.setup import lock_folder

MODEL, MODEL_SHA = "openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
DATA, DATA_SHA = "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
SUBSETS = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
RECIPE = ["--config", "recipes/gpt2-medium-hh/sft.yaml"]
LOAD = {
    "tokenizer": lambda name=MODEL, revision=MODEL_SHA: load_tokenizer(name, revision),
    "model": lambda name=MODEL, revision=MODEL_SHA: load_model(name, revision),
    "dataset": lambda name=DATA, revision=DATA_SHA: download_dataset(name, revision, None, FILE_SUFFIXES),
}


class WatchedHandler(Handler):
    """Remembers every request, and answers those for files with `server.error`, where there is one."""

    def route(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.error:
            raise self.server.error
        super().route()


@pytest.fixture(scope="module")
def hub_root(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a few pairs under the ids of the default recipe."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model, root / "models" / MODEL)
    for split in ("train", "test"):
        rows = (task / "data" / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        for index, subset in enumerate(SUBSETS):  # other rows in each, as in the real ones
            folder = root / "datasets" / DATA / subset
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[index :: len(SUBSETS)])))
    red_team = root / "datasets" / DATA / "red-team-attempts" / "red_team_attempts.jsonl.gz"  # no preference pairs
    red_team.parent.mkdir()
    red_team.write_bytes(gzip.compress(json.dumps([{"transcript": "none"}]).encode()))
    return root


@pytest.fixture
def server(hub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A stand-in Hub that this process's clients use, with an empty cache."""
    server = Server(hub_root, {MODEL: MODEL_SHA, DATA: DATA_SHA}, WatchedHandler)
    server.requests, server.error = [], None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the clients' pauses between attempts
    use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_the_default_recipe_trains_from_the_hub(server: Server, tmp_path: Path, capsys):
    importlib.import_module("inspect_data").main([*RECIPE, "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["train"]["pairs_in"], figures["test"]["pairs_in"]) == (96, 32), "not the four preference folders"
    assert "may be offensive" in capsys.readouterr().out, "nothing warns of what the data hold"
    run("sft", *RECIPE, "--max_steps", "2", "--pairs_per_step", "4", "--max_length", "64", "--max_question_length",
        "32", "--eval_strategy", "no", "--dataloader_num_workers", "0", "--output_dir", tmp_path / "run")  # fmt: skip
    assert (tmp_path / "run/train_results.json").is_file()
    files = [line for line in server.requests if "/resolve/" in line]
    assert any("model.safetensors" in line for line in files) and any("train.jsonl.gz" in line for line in files)
    unpinned = [line for line in files if MODEL_SHA not in line and DATA_SHA not in line]
    assert not unpinned, f"not at the pinned commits: {unpinned}"


def test_an_adapter_on_the_hub_is_merged(server: Server, hub_root: Path, tiny_model: Path, tmp_path: Path):
    adapter = hub_root / "models/me/adapter"
    config = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(load_model(str(tiny_model)), config)
    model.save_pretrained(adapter)
    load_tokenizer(str(tiny_model)).save_pretrained(adapter)
    server.shas["me/adapter"] = MODEL_SHA
    merge = importlib.import_module("merge").main
    merge(["--model_name_or_path", "me/adapter", "--output_dir", str(tmp_path / "merged")])
    merged = load_model(str(tmp_path / "merged"))
    load_tokenizer(str(tmp_path / "merged"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits)


def sentence(load: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    assert "\n" not in str(caught.value), "more than one sentence"
    return str(caught.value)


@pytest.mark.parametrize("kind", LOAD)
def test_what_the_hub_answers_is_one_sentence_without_the_token(server: Server, kind: str, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_ThisMustNeverBeSeen")
    thing = "dataset" if kind == "dataset" else "model"
    for missing in ("nobody/nothing", "runs/recipe/sft"):
        message = sentence(lambda missing=missing: LOAD[kind](missing, None))
        assert f"there is no {thing} '{missing}'" in message and "make quickstart" in message
    assert f"has no revision 'abcdef'; check --{thing}_revision" in sentence(lambda: LOAD[kind](revision="abcdef"))
    server.error = HubError(403, "gated on purpose", "GatedRepo")
    assert "is gated: accept its terms on the Hub and log in" in sentence(LOAD[kind])
    server.error = HubError(500, "failing on purpose")
    message = sentence(LOAD[kind])
    assert (DATA if kind == "dataset" else MODEL) in message and "make quickstart" in message
    assert "hf_ThisMustNeverBeSeen" not in message + "".join(capfd.readouterr())


@pytest.mark.parametrize("kind", LOAD)
def test_without_network_the_cache_is_used(server: Server, kind: str, tmp_path: Path, monkeypatch):
    from huggingface_hub import constants

    LOAD[kind]()
    count = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    LOAD[kind]()
    assert len(server.requests) == count, "HF_HUB_OFFLINE is set, and yet the Hub is asked"
    use_hub(monkeypatch, "http://127.0.0.1:1", tmp_path / "cache")  # nothing listens there
    LOAD[kind]()
    use_hub(monkeypatch, "http://127.0.0.1:1", tmp_path / "empty")
    message = sentence(LOAD[kind])
    assert "is not in the cache and the Hub cannot be reached" in message and "make quickstart" in message


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_damaged_weights_are_named(folder: Path):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    message = sentence(lambda: load_model(str(folder)))
    assert str(folder) in message and "cut or damaged" in message


def test_code_of_a_models_own_is_not_run(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise AssertionError('code of a model was run')")
    message = sentence(lambda: load_model(str(folder)))
    assert "needs its own code, which only training runs" in message, "a flag is advised that evaluation does not have"


def test_pickled_weights_are_refused(folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "could not be loaded" in sentence(lambda: load_model(str(folder)))


@pytest.mark.parametrize("shard", ["weights.bin", "../weights.safetensors"])
def test_an_index_that_names_a_pickle_or_a_file_elsewhere_is_refused(shard: str, folder: Path):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "weights.bin")
    (folder / "model.safetensors").rename(folder.parent / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (lambda: load_model(str(folder)), lambda: start_training("sft", folder)):
        assert f"names {shard}, which is not a safetensors file in the same folder" in sentence(load)


def start_training(stage: str, model: Path, *flags: str | Path) -> None:
    argv = ["--model_name_or_path", model, "--dataset_name", "no.jsonl", "--output_dir", model.parent / "run"]
    run(stage, *argv, *flags)


@pytest.mark.parametrize("missing", ["lm_head.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_missing_weights_are_named_and_not_drawn_at_random(missing: str, folder: Path, tiny_model: Path):
    weights = load_file(folder / "model.safetensors")
    if weights.pop(missing, None) is None:  # it is the embedding, until they are untied
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    starts = {
        "a model to evaluate": lambda: load_model(str(folder)),
        "SFT's start": lambda: start_training("sft", folder),
        "DPO's reference": lambda: start_training("dpo", tiny_model, "--ref_model_name_or_path", folder),
    }
    if missing != "lm_head.weight":
        starts["a reward model's start"] = lambda: start_training("reward", folder)
    for start, load in starts.items():
        assert missing.removeprefix("transformer.") in sentence(load), f"{start} has random weights"


def test_a_reward_model_is_no_policy(tiny_model: Path, folder: Path):
    write_reward_model(tiny_model, folder, None)
    assert "is a reward model" in sentence(lambda: load_model(str(folder)))


def test_a_run_without_its_model_says_what_it_is(folder: Path):
    run = RunFolder(folder)
    run.config_file.touch()
    (folder / "checkpoint-50").mkdir()
    for load in (lambda: load_model(str(folder)), lambda: load_tokenizer(str(folder))):
        with lock_folder(run):
            assert f"is still training; wait until it has finished, or pass {folder}/checkpoint-50" in sentence(load)
        assert "was stopped; rerun the command that started it" in sentence(load)
    run.results_file.write_text("{}")
    load_model(str(folder))
    (folder / "model.safetensors").unlink()
    assert "has no weights file (*.safetensors)" in sentence(lambda: load_model(str(folder)))


def test_a_missing_model_names_the_command_that_makes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for name, command in (("dpo", ""), ("dpo-512", " STAGE=dpo-512")):
        message = sentence(lambda name=name: load_tokenizer(f"runs/gpt2-medium-hh/{name}"))
        assert f"`make dpo RECIPE=recipes/gpt2-medium-hh{command}`" in message


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert "eos_token" in sentence(lambda: load_tokenizer(str(folder)))
