"""SFT and DPO through their scripts, on a tiny model: what trains, what a run's folder holds, and what is refused."""

import importlib
import json
import signal
from pathlib import Path

import pytest
import yaml
from running import log, run
from transformers import LlamaConfig, LlamaForCausalLM

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_split
from tinydpo.errors import UserError
from tinydpo.training.packing import pack
from tinydpo.training.throughput import forward_flop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sft(task, tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    run("sft", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", folder,
        "--learning_rate", "3e-3", "--max_steps", "12")  # fmt: skip
    return folder


def dpo_args(sft: Path, task: Path, folder: Path) -> list:
    return ["--model_name_or_path", sft, "--dataset_name", task / "data", "--output_dir", folder,
            "--learning_rate", "3e-3", "--max_steps", "12", "--precompute_ref_log_probs", "true"]  # fmt: skip


@pytest.fixture(scope="module")
def dpo(sft, task) -> Path:
    run("dpo", *dpo_args(sft, task, sft.parent / "dpo"))
    return sft.parent / "dpo"


def test_loss_falls(sft, dpo):
    for folder in (sft, dpo):
        losses = log(folder, "loss")
        assert sum(losses[-3:]) < sum(losses[:3]), f"{folder.name} does not learn: {losses}"
    assert log(dpo, "loss")[0] == pytest.approx(0.6931, abs=1e-3), "policy and reference differ before the first step"
    assert log(dpo, "rewards/margins")[-1] > 0.2, "DPO does not raise the margin between chosen and rejected"


def test_folder_holds_what_the_readme_promises(sft, dpo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (sft, dpo):
        for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "run_config.yaml", "README.md",
                     "data_summary.json", "train_results.json", "trainer_state.json", "environment.json"):  # fmt: skip
            assert (folder / name).is_file(), f"{folder.name} lacks {name}"
        assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG", "the curves were not drawn"
        assert not list(folder.glob("**/pytorch_model*.bin")), "weights were pickled"
        assert len(list(folder.glob("checkpoint-*"))) == 2, "more or fewer than the last 2 checkpoints were kept"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == model.generation_config.eos_token_id
        assert model.generation_config.top_k == 0, "sampling from the saved model cuts the distribution at 50 tokens"
        known = json.loads((folder / "environment.json").read_text())
        assert known["seed"] == 0 and known["packages"]["trl"], "the run cannot be traced to versions and seed"
        assert json.loads((folder / "data_summary.json").read_text())["train"]["pairs_kept"] > 0
        card = (folder / "README.md").read_text()
        assert "128 tokens" in card and str(folder.parent) not in card, "the card lacks the rule or leaks a path"
    assert "beta 0.1" in (dpo / "README.md").read_text(), "the card does not state beta"


def test_a_finished_run_says_so_and_a_changed_recipe_is_refused(sft, dpo, task, capsys):
    before = (dpo / "model.safetensors").stat().st_mtime_ns
    run("dpo", *dpo_args(sft, task, dpo), "--report_to", "none", "--logging_steps", "1")
    assert "finished" in capsys.readouterr().out, "a finished run does not say that it is"
    with pytest.raises(UserError, match=r"beta.*0\.1.*0\.3.*--output_dir"):
        run("dpo", *dpo_args(sft, task, dpo), "--beta", "0.3")
    assert (dpo / "model.safetensors").stat().st_mtime_ns == before, "a finished run was trained again"


def test_an_interrupted_run_goes_on_and_ends_the_same(sft, dpo, task, capsys):
    folder = sft.parent / "again"
    run("dpo", *dpo_args(sft, task, folder))
    whole = (folder / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "train_results.json"):
        (folder / name).unlink()
    import shutil

    shutil.rmtree(folder / "checkpoint-12")
    capsys.readouterr()
    run("dpo", *dpo_args(sft, task, folder))
    assert "checkpoint-8" in capsys.readouterr().out, "the run started again instead of going on"
    assert (folder / "model.safetensors").read_bytes() == whole, "a resumed run ends with other weights"


def test_run_config_runs_again(dpo, capsys):
    importlib.import_module("dpo").main(["--config", str(dpo / "run_config.yaml")])
    assert "finished" in capsys.readouterr().out, "the folder's own run_config.yaml is not the recipe that made it"


def test_reference_cache_knows_ld_alpha(sft, dpo, task):
    run("dpo", *dpo_args(sft, task, sft.parent / "ld"), "--ld_alpha", "0.5")
    first = log(sft.parent / "ld", "loss")[0]
    assert first == pytest.approx(0.6931, abs=1e-3), (
        "reference log-probs of another ld_alpha were taken from the cache"
    )


def test_sft_takes_prompts_with_responses(task, tiny_model, tmp_path):
    rows = [json.loads(line) for line in (task / "data/train.jsonl").read_text().splitlines()]
    split = [row["chosen"].rpartition("\n\nAssistant:") for row in rows]
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": p + a, "response": c}) + "\n" for p, a, c in split))
    run(
        "sft",
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        data,
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        "1",
    )
    assert (tmp_path / "run/train_results.json").is_file()
    with pytest.raises(UserError, match=r"sft\.jsonl row \d+: .*'chosen'"):
        run("dpo", "--model_name_or_path", tiny_model, "--dataset_name", data, "--output_dir", tmp_path / "no")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max_length", "4096"], r"max_length is 4096.*positions"),
        (["--model_name_or_path", "no/such/folder"], "no/such/folder"),
        (["--dataset_train_split", "tarin"], r"no split 'tarin'"),
        (["--loss_type", "exo_pair"], r"[Ll]abel smoothing"),
        (["--pairs_per_step", "0"], "pairs_per_step"),
    ],
)
def test_a_mistake_leaves_nothing_behind(flags, told, sft, task, tmp_path):
    with pytest.raises(UserError, match=told):
        run("dpo", *dpo_args(sft, task, tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists(), "a run that never began left a folder behind"


def test_resolved_config_has_no_secret(sft):
    config = yaml.safe_load((sft / "run_config.yaml").read_text())
    assert "hub_token" not in config and config["learning_rate"] == 3e-3


def test_a_run_logs_how_fast_it_is(sft, dpo):
    for folder in (sft, dpo):
        rates = {name: log(folder, name) for name in ("pairs_per_second", "tokens_per_second", "padding")}
        losses = len(log(folder, "loss"))
        for name, values in rates.items():
            assert len(values) == losses - 1, f"{folder.name}: {name} is missing from a log after the first step's"
        assert all(0 <= padding < 0.5 for padding in rates["padding"]), f"padding is {rates['padding']}"
        tokens = [t / p for t, p in zip(rates["tokens_per_second"], rates["pairs_per_second"], strict=True)]
        low, high = (20, 140) if folder == sft else (40, 240)
        assert all(low < n < high for n in tokens), f"{folder.name}: {tokens} tokens a pair are not what was computed"
        results = json.loads((folder / "train_results.json").read_text())
        speeds = rates["pairs_per_second"]
        assert min(speeds) <= results["pairs_per_second"] <= max(speeds), "the whole run's rate is none of its steps'"
        # 12 steps of 16 pairs, the first left out, take no longer than the run's own clock says
        assert 11 * 16 / results["pairs_per_second"] < results["train_runtime"], "evaluation counts as training"


def test_rates_are_those_of_what_was_packed(sft, dpo, task, tiny_tokenizer, tmp_path):
    """Sixteen pairs, all of them in every step: tokens a pair and padding are known before training."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_bytes((task / "data/test.jsonl").read_bytes())
    (data / "train.jsonl").write_bytes(b"".join((task / "data/train.jsonl").open("rb").readlines()[:16]))
    split = load_split(DataArguments(dataset_name=str(data)), tiny_tokenizer, 128, "train")
    trees = [(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in split.pairs]
    tokens = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in trees)
    flags = [*dpo_args(sft, task, tmp_path / "run"), "--dataset_name", data, "--max_steps", "4"]
    # Fewer steps than there are between logs, and a whole run's rates all the same.
    flags += ["--per_device_train_batch_size", "16", "--logging_steps", "10", "--eval_strategy", "no"]
    results = {}
    for engine in ("true", "false"):
        run("dpo", *flags, "--shared_prefix", engine, "--output_dir", tmp_path / engine)
        results[engine] = json.loads((tmp_path / engine / "train_results.json").read_text())
        ratio = results[engine]["tokens_per_second"] / results[engine]["pairs_per_second"]
        assert ratio == pytest.approx(tokens / 16, rel=2e-3), f"shared_prefix {engine}: not the tokens of a pair"
    positions = pack(trees, 512)["input_ids"].numel()
    assert results["true"]["padding"] == pytest.approx(1 - tokens / positions, abs=1e-3), "not the rows' padding"
    assert "padding" not in results["false"], "padded batches, with prompts in them twice, pass for packed rows"


@pytest.mark.parametrize("flags", [[], ["--packing", "true"]])
def test_sft_of_trl_counts_as_the_engine_does(flags, sft, task, tiny_model, tmp_path):
    run("sft", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path / "run",
        "--max_steps", "12", "--shared_prefix", "false", *flags)  # fmt: skip
    stock, packed = (json.loads((folder / "train_results.json").read_text()) for folder in (tmp_path / "run", sft))
    ratios = [results["tokens_per_second"] / results["pairs_per_second"] for results in (stock, packed)]
    assert ratios[0] == pytest.approx(ratios[1], rel=2e-3), f"tokens an example: {ratios}"


@pytest.mark.parametrize("tied", [True, False])
def test_flop_are_those_of_the_floor(tied):
    """A head that shares no weights with the embedding is no block."""
    width, layers, vocabulary = 32, 2, 1000
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    blocks = layers * (4 * width**2 + 3 * width * 64 + 2 * width) + width  # the norms' weights among them
    counted = forward_flop(LlamaForCausalLM(config), tokens=136, scored=83)
    assert counted == 2 * blocks * 136 + 2 * vocabulary * width * 83, "MFU counts other work than the floor does"


def test_a_run_that_failed_leaves_sigterm_as_it_was(task: Path, tiny_model: Path, tmp_path: Path):
    """As `make frontier` goes on after it: what told the run to stop must end the process again."""
    before = signal.getsignal(signal.SIGTERM)
    fails = ["--learning_rate", "1e30", "--warmup_steps", "0", "--eval_strategy", "no", "--save_strategy", "no"]
    with pytest.raises(UserError, match="diverged"):
        run("sft", "--model_name_or_path", tiny_model, "--dataset_name", task / "data", "--output_dir", tmp_path,
            *fails)  # fmt: skip
    assert signal.getsignal(signal.SIGTERM) == before, "SIGTERM is swallowed after a failed run"
