"""SFT and DPO through their scripts, on a tiny model: what trains, what a run's folder holds, and what is refused."""

import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from running import ROOT, log, run
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer
from trl import SFTConfig

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_split
from tinydpo.errors import UserError
from tinydpo.training import train as training
from tinydpo.training.packing import pack
from tinydpo.training.throughput import forward_flop, warn_of_long_run


@pytest.fixture(scope="module")
def sft(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    tiny_model = Path(shutil.copytree(tiny_model, folder.with_name("base")))
    (tiny_model / "README.md").write_text("---\nlicense: mit\nlanguage: en\nbase_model: org/not-this\n---\n# Base\n")
    run("sft", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "12", "--hub_token", "hf_secret")  # fmt: skip
    return folder


def dpo_args(sft: Path, task: Path, folder: Path) -> list:
    return ["--model_name_or_path", sft, "--dataset_name", task / "data", "--output_dir", folder,
            "--learning_rate", "3e-3", "--max_steps", "12", "--precompute_ref_log_probs", "true"]  # fmt: skip


@pytest.fixture(scope="module")
def dpo(sft: Path, task: Path) -> Path:
    run("dpo", *dpo_args(sft, task, sft.parent / "dpo"))
    return sft.parent / "dpo"


def read_results(folder: Path) -> dict:
    return json.loads((folder / "train_results.json").read_text())


def test_loss_falls(sft: Path, dpo: Path):
    for folder in (sft, dpo):
        losses = log(folder, "loss")
        assert sum(losses[-3:]) < sum(losses[:3]), f"{folder.name} does not learn: {losses}"
    assert log(dpo, "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ before the first step"
    assert log(dpo, "rewards/margins")[-1] > 0.2


def test_folder_holds_what_the_docs_promise(sft: Path, dpo: Path):
    for folder in (sft, dpo):
        for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "run_config.yaml", "README.md",
                     "data_summary.json", "train_results.json", "trainer_state.json", "environment.json"):  # fmt: skip
            assert (folder / name).is_file(), f"{folder.name} lacks {name}"
        assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
        assert len(list(folder.glob("checkpoint-*"))) == 2, "--save_total_limit is not kept"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id
        assert model.generation_config.top_k == 0, "sampling from the saved model cuts the distribution at 50 tokens"
        assert model.config.use_cache, "the saved model generates without a cache"
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["seed"] == 0 and {"torch", "trl"} <= set(environment["packages"])
        card = (folder / "README.md").read_text()
        assert "\n\n![curves](curves.png)\n" in card
        assert "128 tokens" in card and str(folder.parent) not in card, "the card lacks the rule or leaks a path"
        config = yaml.safe_load((folder / "run_config.yaml").read_text())
        assert config["learning_rate"] == 3e-3
        for file in folder.rglob("*"):
            if file.is_file():
                assert b"hf_secret" not in file.read_bytes(), f"{file} holds the Hub's token"
    assert "beta 0.1" in (dpo / "README.md").read_text()


def test_the_record_names_the_version_that_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    older = tmp_path / "trl-0.1.dist-info"
    older.mkdir()
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert training.describe_environment(seed=0, on_cpu=True)["packages"]["trl"] == version("trl") != "0.1"


def test_the_card_is_one_for_the_hub(dpo: Path):
    card = ModelCard.load(dpo / "README.md")
    facts = {"license": "mit", "language": "en", "library_name": "transformers", "pipeline_tag": "text-generation"}
    assert card.data.to_dict().items() >= facts.items(), "the base's license, or what the Hub needs, is missing"
    assert card.data.base_model is None, "a model is claimed as base that it was not trained from"
    code = card.text.partition("```python\n")[2].partition("```")[0]
    namespace: dict = {}
    exec(code.replace(f'"{dpo.name}"', f'"{dpo}"'), namespace)  # an absolute path is not shown
    assert namespace["prompt"].endswith("\n\nAssistant:"), "the example is not in the form of the training data"
    assert "12 steps, 2 epochs of 96 pairs" in card.text and f"trl {version('trl')}" in card.text
    held_out = card.text.partition("## Training")[2]
    assert "on 16 held-out pairs" in held_out and "| rewards/accuracies |" in held_out
    assert "None yet." in card.text.partition("## Evaluation")[2].partition("##")[0]
    assert "runtime" not in card.text and "per_second" not in card.text, "times pass for results"
    assert "bibtex" in card.text


def test_a_finished_run_says_so_and_other_settings_are_refused(sft: Path, dpo: Path, task: Path, capsys):
    before = (dpo / "model.safetensors").stat().st_mtime_ns
    run("dpo", *dpo_args(sft, task, dpo), "--report_to", "none")
    assert "finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"beta.*0\.1.*0\.3.*--output_dir"):
        run("dpo", *dpo_args(sft, task, dpo), "--beta", "0.3")
    assert (dpo / "model.safetensors").stat().st_mtime_ns == before, "a finished run was trained again"


def test_a_finished_run_is_the_same_on_another_machine_and_after_an_upgrade(
    sft: Path, dpo: Path, task: Path, tmp_path
):
    folder = shutil.copytree(dpo, tmp_path / "dpo")
    config = yaml.safe_load((folder / "run_config.yaml").read_text())
    del config["weight_decay"]  # a flag that the older TRL did not have
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config | {"use_cpu": False, "gone_since": 1}))
    run("dpo", *dpo_args(sft, task, folder))
    with pytest.raises(UserError, match=r"weight_decay: 0\.5"):
        run("dpo", *dpo_args(sft, task, folder), "--weight_decay", "0.5")


def test_a_run_is_repeated_with_another_batch_on_a_device(sft: Path, dpo: Path, tmp_path: Path):
    flags = ["--per_device_train_batch_size", "1", "--accelerate_config", ROOT / "accelerate_configs/cpu.yaml"]
    run("dpo", "--config", dpo / "run_config.yaml", "--output_dir", tmp_path, *flags)
    before, after = (yaml.safe_load((folder / "run_config.yaml").read_text()) for folder in (dpo, tmp_path))
    assert before["pairs_per_step"] == after["pairs_per_step"]
    assert not {"accelerate_config", "use_cpu"} & set(after), "repeated on a GPU, it would train on the CPU"


def test_a_failed_push_is_tried_again(task: Path, tiny_model: Path, tmp_path: Path, monkeypatch, capsys):
    pushed = []
    failures = [OSError("no network"), KeyboardInterrupt()]

    def upload_folder(folder_path: Path, ignore_patterns: list[str], **kwargs: object) -> None:
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*")]
        pushed.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
        if failures:
            raise failures.pop(0)

    flags = ["--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path,
             "--max_steps", "2", "--save_steps", "1", "--eval_strategy", "no", "--push_to_hub", "true"]  # fmt: skip
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep this test's Hub for others
    with pytest.raises(UserError, match="push_to_hub is true, but the Hub repository could not be created"):
        run("sft", *flags)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer: setattr(trainer, "hub_model_id", "me/sft"))
    monkeypatch.setattr(training, "upload_folder", upload_folder)
    with pytest.raises(UserError, match=r"could not be pushed to the Hub \(no network\); run the same command again"):
        run("sft", *flags)
    with pytest.raises(KeyboardInterrupt):
        run("sft", *flags)
    run("sft", *flags)
    assert "Resuming from" in capsys.readouterr().out, "it is trained again"
    run("sft", *flags)
    assert len(pushed) == 3, "a pushed run is pushed again"
    for names in pushed:
        assert {"README.md", "curves.png", "model.safetensors"} <= names, "pushed too early"
        for name in names - {"model.safetensors"}:
            assert str(tmp_path).encode() not in (tmp_path / name).read_bytes(), f"{name} shows others a local path"
        assert ".lock" not in names


def test_reference_cache_knows_ld_alpha(sft: Path, dpo: Path, task: Path, tmp_path: Path):
    # Six steps take every row, as `dpo` did: with fewer rows there would be no log-probs of its to mistake.
    run("dpo", *dpo_args(sft, task, tmp_path), "--ld_alpha", "0.5", "--max_steps", "6")
    assert log(tmp_path, "loss")[0] == pytest.approx(0.6931, abs=1e-3), "log-probs of a different ld_alpha were taken"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--max_length", "4096"], r"max_length is 4096.*positions"),
        (["--model_name_or_path", "no/such/folder"], "no/such/folder"),
        (["--dataset_train_split", "tarin"], r"no split 'tarin'"),
        (["--loss_type", "exo_pair"], r"[Ll]abel smoothing"),
        (["--pairs_per_step", "0"], "pairs_per_step"),
    ],
)
def test_a_mistake_leaves_nothing_behind(flags: list[str], error: str, sft: Path, task: Path, tmp_path: Path):
    with pytest.raises(UserError, match=error):
        run("dpo", *dpo_args(sft, task, tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


def test_a_models_own_code_runs_on_request_only(tiny_model: Path, task: Path, tmp_path: Path):
    owned = tmp_path / "owned"
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "code.Strange", "AutoModelForCausalLM": "code.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": classes}))
    (model / "code.py").write_text(
        f"open({str(owned)!r}, 'w').close()\nfrom transformers import GPT2Config, GPT2LMHeadModel\n"
        "class Strange(GPT2Config):\n    model_type = 'strange'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Strange\n"
    )
    flags = [*dpo_args(model, task, tmp_path / "run"), "--max_steps", "1"]
    with pytest.raises(UserError, match="--trust_remote_code true"):
        run("dpo", *flags)
    assert not owned.exists()
    run("dpo", *flags, "--trust_remote_code", "true")
    assert owned.exists()


def test_a_run_logs_how_fast_it_is(sft: Path, dpo: Path):
    for folder in (sft, dpo):
        results = read_results(folder)
        for name in ("pairs_per_second", "tokens_per_second", "padding"):
            rates = log(folder, name)
            assert len(rates) == len(log(folder, "loss")) - 1, f"{name} is not in every log but the first"
            assert 0 <= min(rates) <= results[name] <= max(rates)
        # 12 steps of 16 pairs, the first left out, take no longer than the run's own clock says.
        assert 11 * 16 / results["pairs_per_second"] < results["train_runtime"], "evaluation counts as training"


def tokens_per_pair(folder: Path) -> float:
    results = read_results(folder)
    return results["tokens_per_second"] / results["pairs_per_second"]


def test_a_log_is_one_short_line(sft: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run("dpo", *dpo_args(sft, task, tmp_path / "dpo"), "--max_steps", "2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    number = r"-?\d+\.\d+"
    assert re.fullmatch(
        rf"step 2/2  loss {number}  accuracy \d+%  margin {number}  [\d.,]+ pairs/s  0 s left", lines[1]
    )
    assert re.fullmatch(rf"step 2/2  held out:  loss {number}  accuracy \d+%  margin {number}", lines[-1])


def test_rates_are_those_of_what_was_packed(sft: Path, task: Path, tiny_tokenizer, tmp_path: Path):
    """Sixteen pairs, all of them in every step: tokens a pair and padding are known before training."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(task / "data/test.jsonl", data)
    (data / "train.jsonl").write_bytes(b"".join((task / "data/train.jsonl").open("rb").readlines()[:16]))
    split = load_split(DataArguments(dataset_name=str(data)), tiny_tokenizer, 128, "train")
    trees = [(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in split.pairs]
    tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in trees)
    # Fewer steps than there are between logs, and a whole run's rates all the same.
    flags = [*dpo_args(sft, task, tmp_path), "--dataset_name", data, "--max_steps", "3", "--logging_steps", "10",
             "--per_device_train_batch_size", "16", "--eval_strategy", "no"]  # fmt: skip
    for shared_prefix in ("true", "false"):
        run("dpo", *flags, "--shared_prefix", shared_prefix, "--output_dir", tmp_path / shared_prefix)
        assert tokens_per_pair(tmp_path / shared_prefix) == pytest.approx(tokens / 16, rel=2e-3)
    positions = pack(trees, 512)["input_ids"].numel()
    assert read_results(tmp_path / "true")["padding"] == pytest.approx(1 - tokens / positions, abs=1e-3)
    assert "padding" not in read_results(tmp_path / "false"), "padded batches, prompts in them twice, count as packed"


def test_padded_sft_counts_the_same_tokens(sft: Path, task: Path, tiny_model: Path, tmp_path: Path):
    run("sft", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path,
        "--max_steps", "12", "--shared_prefix", "false", "--eval_strategy", "no", "--logging_steps", "100",
        "--completion_only_loss", "false")  # fmt: skip
    assert tokens_per_pair(tmp_path) == pytest.approx(tokens_per_pair(sft), rel=2e-3)
    card = (tmp_path / "README.md").read_text()
    assert "answers, prompts included" in card
    assert "curves.png" not in card, "nothing was logged to draw"
    assert "answers, completion tokens only" in (sft / "README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_flop_are_those_of_the_floor(tied: bool):
    """A head that shares no weights with the embedding is no block."""
    width, layers, vocabulary = 32, 2, 1000
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    blocks = layers * (4 * width**2 + 3 * width * 64 + 2 * width) + width  # the norms' weights among them
    counted = forward_flop(LlamaForCausalLM(config), tokens=136, scored=83)
    assert counted == 2 * blocks * 136 + 2 * vocabulary * width * 83


def test_a_run_of_hours_is_told_before_it_starts(tiny_model: Path, capsys: pytest.CaptureFixture[str]):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    pairs = Dataset.from_dict({name: [[1] * 40] * 200 for name in ("prompt_ids", "chosen_ids", "rejected_ids")})

    for told, flags in ((True, {}), (False, {"max_steps": 2})):
        training = SFTConfig(use_cpu=True, per_device_train_batch_size=8, num_train_epochs=1e9, **flags)
        warn_of_long_run("dpo", training, model, pairs)
        assert ("hours on this CPU" in capsys.readouterr().out) == told, flags
