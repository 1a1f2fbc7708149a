"""Evaluation: log-probs that agree with a direct computation, samples of the model's own distribution, the script."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toys import write_rows
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tinydpo.errors import UserError
from tinydpo.evaluation.metrics import kl_metrics, length_metrics, pair_metrics
from tinydpo.evaluation.sampling import choose_prompts, cut_prompt, sample_answers, sample_cached
from tinydpo.evaluation.table import format_samples, format_table
from tinydpo.files import read_jsonl
from tinydpo.training.logps import pair_logps, token_logps

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END = len(BYTES)

pytestmark = pytest.mark.usefixtures("one_thread")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and an end token that also pads, as GPT-2's does."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*BYTES, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def tiny_gpt2(seed: int) -> GPT2LMHeadModel:
    """A random GPT-2 whose next-token distribution is far from uniform."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=END + 1, n_embd=32, n_layer=2, n_head=2, n_positions=160, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = END
    return GPT2LMHeadModel(config).eval()


def steer_end(model: GPT2LMHeadModel, logit: float) -> GPT2LMHeadModel:
    """The same logits at every position: `logit` for the end token, about 0 for the others."""
    with torch.no_grad():
        end = model.transformer.wte.weight[-1]
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(logit * end / end.dot(end))
    return model


def random_pairs(n: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    columns = {
        name: [rng.integers(END + 1, size=rng.integers(1, 40)).tolist() for _ in range(n)]
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    return Dataset.from_dict(columns)


@torch.no_grad()
def direct_logps(model: GPT2LMHeadModel, pairs: Dataset, name: str) -> np.ndarray:
    """Sums of completion log-probs, one sequence at a time: every logit, no mask, no padding."""
    sums = []
    for prompt, completion in zip(pairs["prompt_ids"], pairs[f"{name}_ids"], strict=True):
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        sums.append(sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)))
    return np.array(sums)


def test_pair_metrics_agree_with_direct_computation():
    policy, ref, pairs = tiny_gpt2(0), tiny_gpt2(1), random_pairs(23, seed=2)
    policy_chosen, policy_rejected = (direct_logps(policy, pairs, name) for name in ("chosen", "rejected"))
    ref_chosen, ref_rejected = (direct_logps(ref, pairs, name) for name in ("chosen", "rejected"))
    margins = 0.1 * (policy_chosen - ref_chosen - policy_rejected + ref_rejected)
    tokens = sum(map(len, pairs["chosen_ids"]))
    expected = {
        "reward_accuracy": (margins > 0).mean(),
        "reward_margin": margins.mean(),
        "dpo_loss": np.mean([math.log1p(math.exp(-margin)) for margin in margins]),
        "nll_chosen_policy": -policy_chosen.sum() / tokens,
        "nll_chosen_ref": -ref_chosen.sum() / tokens,
        "raw_likelihood_accuracy_policy": (policy_chosen > policy_rejected).mean(),
        "raw_likelihood_accuracy_ref": (ref_chosen > ref_rejected).mean(),
    }
    metrics = pair_metrics(pair_logps(policy, pairs, 5), pair_logps(ref, pairs, 5), beta=0.1)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_sampled_kl_agrees_with_exact_kl():
    # Both models are the same at every position, so one-token answers have a KL that can be computed exactly.
    policy, ref = steer_end(tiny_gpt2(0), 6.0), steer_end(tiny_gpt2(0), 3.0)
    with torch.no_grad():
        p, q = (model(torch.tensor([[1]])).logits[0, -1].double().log_softmax(-1) for model in (policy, ref))
    exact = (p.exp() * (p - q)).sum().item()
    prompts = [[1]] * 2000
    answers = sample_answers(policy, byte_tokenizer(), prompts, 1, batch_size=500)
    kl = kl_metrics(token_logps(policy, prompts, answers.ids, 500), token_logps(ref, prompts, answers.ids, 500))
    assert exact > 0.1 and abs(kl["kl_per_sequence"] - exact) < 4 * kl["kl_per_sequence_se"] + 1e-3
    assert kl["kl_per_token"] == pytest.approx(kl["kl_per_sequence"])


@pytest.mark.parametrize(("logit", "length", "ended"), [(100.0, 1, True), (-100.0, 7, False)])
def test_answer_stops_at_the_end_token_and_keeps_it(logit: float, length: int, ended: bool):
    answers = sample_answers(steer_end(tiny_gpt2(0), logit), byte_tokenizer(), [[1], [2, 3], [4] * 9], 7, batch_size=2)
    assert answers.ended == [ended] * 3
    assert [len(ids) for ids in answers.ids] == [length] * 3, "padding counts as answer, or the end token does not"
    assert all((ids[-1] == END) is ended for ids in answers.ids)
    lengths = length_metrics(answers, answers)
    assert (lengths["mean_length_policy"], lengths["ended_ref"]) == (length, float(ended))


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 0.0}])
def test_left_padding_does_not_change_answers(settings: dict[str, Any]):
    model, rng = tiny_gpt2(0), np.random.default_rng(0)
    prompts = [rng.integers(END, size=length).tolist() for length in (3, 50, 1, 17, 50, 8)]
    answers = sample_answers(model, byte_tokenizer(), prompts, 12, **settings, batch_size=6)
    for prompt, answer in zip(prompts, answers.ids, strict=True):
        greedy: list[int] = []
        while len(greedy) < 12 and END not in greedy:
            with torch.no_grad():
                greedy.append(model(torch.tensor([prompt + greedy])).logits[0, -1].argmax().item())
        assert answer == greedy, "a prompt padded beside longer ones gets another answer than alone"


def test_generation_defaults_of_the_checkpoint_are_not_used():
    model, tokenizer, prompts = tiny_gpt2(0), byte_tokenizer(), [[1, 2], [3]] * 8
    plain = sample_answers(model, tokenizer, prompts, 10, seed=5)
    for name, value in (("top_k", 1), ("repetition_penalty", 9.0), ("min_p", 0.9), ("temperature", 0.01)):
        setattr(model.generation_config, name, value)
    assert sample_answers(model, tokenizer, prompts, 10, seed=5) == plain, "samples are not the policy's: KL is wrong"
    assert model.generation_config.top_k == 1, "sampling changes the model it was given"
    assert sample_answers(model, tokenizer, prompts, 10, seed=6) != plain, "--seed has no effect"


def test_answers_are_cached_by_weights_prompts_and_settings(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer, prompts = tiny_gpt2(7), byte_tokenizer(), [[1, 2], [3]] * 4
    first = sample_cached(model, tokenizer, prompts, 10, seed=5)
    assert first == sample_answers(model, tokenizer, prompts, 10, seed=5)
    others = [
        sample_cached(tiny_gpt2(8), tokenizer, prompts, 10, seed=5),
        sample_cached(model, tokenizer, prompts, 10, seed=6),
        sample_cached(model, tokenizer, prompts, 10, seed=5, temperature=0.5),
        sample_cached(model, tokenizer, prompts[::-1], 10, seed=5),
    ]
    assert all(other != first for other in others), "another model's or setting's answers are taken for these"
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)  # sampling again would fail
        assert sample_cached(model, tokenizer, prompts, 10, seed=5) == first
    for path in (Path(datasets.config.HF_DATASETS_CACHE) / "tinydpo-answers").iterdir():
        path.write_text(path.read_text()[:20])
    assert sample_cached(model, tokenizer, prompts, 10, seed=5) == first, "a damaged cache ends the evaluation"


def test_cut_prompts_keep_their_end_and_the_begin_token():
    assert cut_prompt([1, 2, 3, 4], 4, None) == [1, 2, 3, 4]
    assert cut_prompt([1, 2, 3, 4], 2, None) == [3, 4]
    assert cut_prompt([0, 1, 2, 3], 2, 0) == [0, 3]


def test_prompts_are_chosen_by_seed_and_without_duplicates():
    texts = Dataset.from_dict({"prompt": [f"p{i % 30}" for i in range(90)], "row": list(range(90))})
    assert choose_prompts(texts, 512, 0)["row"][:] == list(range(30))
    chosen = choose_prompts(texts, 10, 0)["prompt"][:]
    assert len(set(chosen)) == 10
    assert chosen == choose_prompts(texts, 10, 0)["prompt"][:] != choose_prompts(texts, 10, 1)["prompt"][:]


def test_evaluate_writes_figures_samples_pairs_report_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("policy", "ref")):
        tiny_gpt2(seed).save_pretrained(role)
        byte_tokenizer().save_pretrained(role)
    prompts = [f"\n\nHuman: Is it {i}?\n\nAssistant:" for i in range(12)]
    subsets = ["<img src=x>|\x1b[31m\n# a", 7] * 6
    rows = zip(prompts, subsets, strict=True)
    answers = {"chosen": " Yes.", "rejected": " No, never!"}
    write_rows(Path("data"), [{"prompt": prompt, "subset": subset, **answers} for prompt, subset in rows])
    Path("rewards_for_test.py").write_text(
        "def length(prompts, completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("policy/README.md").write_text("# Card\n\n## Evaluation\n\nof old\n\n## Content notice\n\nkept\n")
    Path("policy/train_results.json").write_text("{}")
    argv = ["--model_name_or_path", "policy", "--ref_model_name_or_path", "ref", "--dataset_name", "data",
            "--output_dir", "out", "--num_prompts", "8", "--reward_funcs", "rewards_for_test.length"]  # fmt: skip
    evaluate.main(argv)

    assert sorted(path.name for path in Path("out").iterdir()) == ["eval_results.json", "pairs.jsonl", "samples.jsonl"]
    assert Path("report.html").is_file()
    results = json.loads(Path("out/eval_results.json").read_text())
    samples, pairs = (read_jsonl(Path(f"out/{name}.jsonl")) for name in ("samples", "pairs"))
    assert results["pairs"] == len(pairs) == 12 and len(samples) == 8
    assert np.mean([pair["margin"] > 0 for pair in pairs]) == results["reward_accuracy"]
    assert np.mean([len(sample["policy"]) for sample in samples]) == results["reward_policy"]
    token_sums = [sum(sample["token_rewards"]) for sample in samples]
    assert np.mean(token_sums) == pytest.approx(0.1 * results["kl_per_sequence"], rel=1e-5)
    for sample in samples:
        assert "".join(sample["pieces"]).removesuffix("<end>") == sample["policy"]
        assert len(sample["pieces"]) == len(sample["token_rewards"])
    card = Path("policy/README.md").read_text()
    assert f"| reward accuracy | {results['reward_accuracy']:.3f} (" in card
    (measured,) = ModelCard(card).data.eval_results
    assert (measured.metric_value, measured.dataset_name) == (results["reward_accuracy"], "data")
    assert "of old" not in card and card.endswith("## Content notice\n\nkept\n"), "the card's other parts are changed"
    out = capsys.readouterr().out
    assert format_table(results) in out and format_samples(samples[:3]) in out
    assert "biased towards short answers" in out
    assert results["subsets"].keys() == {subsets[0], "7"}, "a numeric subset is not read"
    assert "\x1b" not in out and "pairs of <img src=x>|\\x1b[31m\\n# a\n" in out, (
        "a name is more than text in the terminal"
    )
    assert r"pairs of \<img src=x\>\|\\x1b\[31m\\n# a" in card, "a name is more than text in the model card"

    with pytest.raises(UserError, match="no/such/folder"):
        evaluate.main([*argv, "--model_name_or_path", "./no/such/folder"])
