"""Evaluation: figures that agree with a direct computation, honest samples, one sentence for what cannot be done."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from running import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import EvaluateArguments
from tinydpo.evaluation.metrics import (
    accuracy_by_cut,
    accuracy_by_subset,
    kl_metrics,
    length_metrics,
    pair_metrics,
    reward_metrics,
    wilson_interval,
)
from tinydpo.evaluation.rewards import load_reward, sum_rewards
from tinydpo.evaluation.sampling import choose_prompts, cut_answer, cut_prompt, sample_answers, sample_cached
from tinydpo.evaluation.table import format_interval, format_samples, format_table
from tinydpo.models.loading import check_same_vocabulary
from tinydpo.training.logps import PairLogps, pair_logps, token_logps

GPT2_TOKENIZER = ROOT.parent / "shared" / "gpt2-tokenizer"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END = len(BYTES)
PROMISED = {
    "pairs",
    "reward_accuracy",
    "reward_accuracy_ci95",
    "reward_margin",
    "dpo_loss",
    "beta",
    "nll_chosen_policy",
    "nll_chosen_ref",
    "raw_likelihood_accuracy_policy",
    "raw_likelihood_accuracy_ref",
    "kl_per_sequence",
    "kl_per_token",
    "mean_length_policy",
    "mean_length_ref",
    "ended_policy",
    "ended_ref",
    "reward_policy",
    "reward_ref",
    "win_rate_vs_ref",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and an end token that also pads, as GPT-2's does."""
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*BYTES, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def tiny_gpt2(seed: int, vocab_size: int = END + 1, scale: float = 0.3) -> GPT2LMHeadModel:
    """A random GPT-2 whose next-token distribution is far from uniform."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=160, initializer_range=scale
    )
    config.bos_token_id = config.eos_token_id = vocab_size - 1
    return GPT2LMHeadModel(config).eval()


def steer_end(model: GPT2LMHeadModel, logit: float) -> GPT2LMHeadModel:
    """The same logits at every position: `logit` for the end token, about 0 for the others."""
    with torch.no_grad():
        end = model.transformer.wte.weight[-1]
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(logit * end / end.dot(end))
    return model


def random_pairs(n: int, seed: int, vocab_size: int = END + 1) -> Dataset:
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(vocab_size, size=rng.integers(1, 40)).tolist()

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_dict({name: [ids() for _ in range(n)] for name in columns})


@torch.no_grad()
def direct_logp(model: GPT2LMHeadModel, prompt: list[int], completion: list[int]) -> float:
    """One sequence at a time, every logit, no mask, no padding."""
    logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


def assert_agrees_with_direct(policy: GPT2LMHeadModel, ref: GPT2LMHeadModel, pairs: Dataset, beta: float) -> None:
    sums = {
        (role, name): np.array([direct_logp(model, row["prompt_ids"], row[f"{name}_ids"]) for row in pairs])
        for role, model in (("policy", policy), ("ref", ref))
        for name in ("chosen", "rejected")
    }
    margins = beta * (
        sums["policy", "chosen"] - sums["ref", "chosen"] - sums["policy", "rejected"] + sums["ref", "rejected"]
    )
    tokens = sum(len(row["chosen_ids"]) for row in pairs)
    direct = {
        "reward_accuracy": (margins > 0).mean(),
        "reward_margin": margins.mean(),
        "dpo_loss": np.mean([math.log1p(math.exp(-m)) for m in margins]),
        "nll_chosen_policy": -sums["policy", "chosen"].sum() / tokens,
        "nll_chosen_ref": -sums["ref", "chosen"].sum() / tokens,
        "raw_likelihood_accuracy_policy": (sums["policy", "chosen"] > sums["policy", "rejected"]).mean(),
        "raw_likelihood_accuracy_ref": (sums["ref", "chosen"] > sums["ref", "rejected"]).mean(),
    }
    metrics = pair_metrics(pair_logps(policy, pairs, 5), pair_logps(ref, pairs, 5), beta)
    for name, value in direct.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), f"{name} is not what the two models' log-probs say"


def test_pair_metrics_agree_with_direct_computation():
    assert_agrees_with_direct(tiny_gpt2(0), tiny_gpt2(1), random_pairs(23, seed=2), beta=0.1)


@pytest.mark.skipif(not GPT2_TOKENIZER.is_dir(), reason="needs ../shared/gpt2-tokenizer, not part of the repository")
def test_pair_metrics_agree_on_real_text_with_gpt2_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    rows = [(" How are you?", " I am well.", " Go away, I do not talk to strangers."), (" 2+2?", " 4", " 5")] * 4
    pairs = Dataset.from_list(
        [
            {
                "prompt_ids": tokenizer(f"\n\nHuman:{prompt}\n\nAssistant:")["input_ids"],
                "chosen_ids": [*tokenizer(chosen)["input_ids"], tokenizer.eos_token_id],
                "rejected_ids": [*tokenizer(rejected)["input_ids"], tokenizer.eos_token_id],
            }
            for prompt, chosen, rejected in rows
        ]
    )
    policy, ref = (tiny_gpt2(seed, len(tokenizer)) for seed in (0, 1))
    assert_agrees_with_direct(policy, ref, pairs, beta=0.5)


def test_logps_do_not_depend_on_batches_and_keep_the_order():
    model, pairs = tiny_gpt2(0), random_pairs(17, seed=3)
    alone, together = pair_logps(model, pairs, 1), pair_logps(model, pairs, 64)
    for name in ("chosen", "rejected"):
        np.testing.assert_allclose(
            getattr(alone, name), getattr(together, name), atol=1e-4, err_msg="--batch_size changes the result"
        )
        assert getattr(together, f"{name}_tokens").tolist() == [len(ids) for ids in pairs[f"{name}_ids"]], (
            "log-probs and token counts belong to other rows than the dataset's"
        )


@pytest.mark.parametrize("empty", ["prompt", "completion"])
def test_empty_sequences_are_refused(empty: str):
    prompts, completions = ([[]], [[1]]) if empty == "prompt" else ([[1]], [[]])
    with pytest.raises(ValueError, match=f"row 0 has an empty {empty}"):
        token_logps(tiny_gpt2(0), prompts, completions)


def test_wilson_interval_known_values():
    # Newcombe 1998 (Statistics in Medicine 17:857-872), table I, method 3.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        interval = wilson_interval(successes, n)
        assert interval == pytest.approx((low, high), abs=5e-5), f"the 95 % interval of {successes} of {n} is wrong"
    assert wilson_interval(29, 29)[1] == pytest.approx(1), "the interval of a perfect accuracy must reach 1"
    assert wilson_interval(0, 0) == (0, 1), "no data must say nothing rather than divide by zero"


floats = st.floats(-500, 0)


@given(st.lists(st.tuples(floats, floats, floats, floats), min_size=1, max_size=20), st.floats(0.01, 2))
def test_pair_metrics_properties(rows: list[tuple[float, ...]], beta: float):
    columns = np.array(rows).T
    ones = np.ones(len(rows), dtype=int)
    policy, ref = PairLogps(columns[0], columns[1], ones, ones), PairLogps(columns[2], columns[3], ones, ones)
    metrics = pair_metrics(policy, ref, beta)
    low, high = metrics["reward_accuracy_ci95"]
    assert 0 <= low <= metrics["reward_accuracy"] <= high <= 1, "the interval does not hold the accuracy"
    assert math.isfinite(metrics["dpo_loss"]) and metrics["dpo_loss"] >= 0, "the loss overflows on large margins"
    swapped = pair_metrics(
        PairLogps(columns[1], columns[0], ones, ones), PairLogps(columns[3], columns[2], ones, ones), beta
    )
    assert metrics["reward_accuracy"] + swapped["reward_accuracy"] <= 1 + 1e-9, "a tie counts as right"
    itself = pair_metrics(policy, policy, beta)
    assert itself["reward_accuracy"] == 0, "a policy equal to its reference prefers nothing: every pair is a tie"
    assert itself["dpo_loss"] == pytest.approx(math.log(2)), "the loss of an untrained policy must be ln 2"


def test_pairs_with_a_cut_answer_are_counted_apart():
    margins, whole = np.array([1.0, -1.0, 0.0, 2.0, 3.0]), ["both", "both", "both", "chosen", "neither"]
    told = accuracy_by_cut(margins, whole)
    assert (told["reward_accuracy_whole"], told["reward_accuracy_whole_pairs"]) == (1 / 3, 3), "a tie counts as right"
    assert (told["reward_accuracy_cut"], told["reward_accuracy_cut_pairs"]) == (1, 2), "cut pairs are lost"
    assert told["reward_accuracy_cut_ci95"] == list(wilson_interval(2, 2))
    assert "reward_accuracy_cut" not in accuracy_by_cut(margins[:3], whole[:3]), "a share of no pairs is told"


@given(pairs=st.lists(st.tuples(st.sampled_from(["helpful", "harmless", "x" * 60]), st.floats(-3, 3)), min_size=1))
def test_reward_accuracy_by_subset_adds_up_to_the_whole(pairs: list[tuple[str, float]]):
    subsets, margins = [name for name, _ in pairs], np.array([margin for _, margin in pairs])
    told = accuracy_by_subset(margins, subsets).get("subsets", {})
    assert set(told) == (set(subsets) if len(set(subsets)) > 1 else set()), (
        "a subset is missing, or the whole told twice"
    )
    right = sum(one["pairs"] * one["reward_accuracy"] for one in told.values())
    assert not told or right == pytest.approx((margins > 0).sum()), "subsets lose pairs"
    assert [one["pairs"] for one in told.values()] == sorted((one["pairs"] for one in told.values()), reverse=True)


def test_kl_is_zero_against_itself_and_positive_against_another():
    model, prompts = tiny_gpt2(0), [[1, 2, 3], [4], [5, 6]] * 20
    answers = sample_answers(model, byte_tokenizer(), prompts, 8, batch_size=16)
    own = token_logps(model, prompts, answers.ids)
    assert kl_metrics(own, own)["kl_per_sequence"] == 0, "a model diverges from itself"
    again = kl_metrics(own, token_logps(model, prompts, answers.ids, batch_size=7))
    assert abs(again["kl_per_sequence"]) < 1e-4, "batches alone make a divergence"
    other = kl_metrics(own, token_logps(tiny_gpt2(1), prompts, answers.ids))
    assert other["kl_per_sequence"] > 5 * other["kl_per_sequence_se"], "two different models show no divergence"
    tokens = sum(map(len, answers.ids))
    assert other["kl_per_token"] * tokens == pytest.approx(other["kl_per_sequence"] * len(prompts)), (
        "KL per token and KL per sequence do not come from the same sum"
    )


def test_sampled_kl_agrees_with_exact_kl():
    # Both models are the same at every position, so one-token answers have a KL that can be computed exactly.
    policy, ref = steer_end(tiny_gpt2(0), 6.0), steer_end(tiny_gpt2(0), 3.0)
    with torch.no_grad():
        p, q = (model(torch.tensor([[1]])).logits[0, -1].double().log_softmax(-1) for model in (policy, ref))
    exact = (p.exp() * (p - q)).sum().item()
    prompts = [[1]] * 2000
    answers = sample_answers(policy, byte_tokenizer(), prompts, 1, batch_size=500)
    kl = kl_metrics(token_logps(policy, prompts, answers.ids, 500), token_logps(ref, prompts, answers.ids, 500))
    assert exact > 0.1 and abs(kl["kl_per_sequence"] - exact) < 4 * kl["kl_per_sequence_se"] + 1e-3, (
        "the KL of sampled answers is not the models' KL: the end token or part of the distribution is left out"
    )


@pytest.mark.parametrize(("logit", "length", "ended"), [(100.0, 1, True), (-100.0, 7, False)])
def test_lengths_and_ended_flag(logit: float, length: int, ended: bool):
    answers = sample_answers(steer_end(tiny_gpt2(0), logit), byte_tokenizer(), [[1], [2, 3], [4] * 9], 7, batch_size=2)
    assert answers.ended == [ended] * 3, "the share of answers that end by themselves is wrong"
    assert [len(ids) for ids in answers.ids] == [length] * 3, "padding counts as answer, or the end token does not"
    assert all((ids[-1] == END) is ended for ids in answers.ids), "the end token is lost: KL would leave it out"
    lengths = length_metrics(answers, answers)
    assert (lengths["mean_length_policy"], lengths["ended_ref"]) == (length, float(ended)), "lengths are misreported"


def test_left_padding_does_not_change_answers():
    model, rng = tiny_gpt2(0), np.random.default_rng(0)
    prompts = [rng.integers(END, size=length).tolist() for length in (3, 50, 1, 17, 50, 8)]
    answers = sample_answers(model, byte_tokenizer(), prompts, 12, top_k=1, batch_size=6)
    for prompt, answer in zip(prompts, answers.ids, strict=True):
        greedy: list[int] = []
        while len(greedy) < 12 and END not in greedy:
            with torch.no_grad():
                greedy.append(model(torch.tensor([prompt + greedy])).logits[0, -1].argmax().item())
        assert answer == greedy, "a prompt padded beside longer ones gets another answer than alone"


def test_checkpoint_generation_defaults_are_not_inherited():
    model, tokenizer, prompts = tiny_gpt2(0), byte_tokenizer(), [[1, 2], [3]] * 8
    plain = sample_answers(model, tokenizer, prompts, 10, seed=5)
    for name, value in (("top_k", 1), ("repetition_penalty", 9.0), ("min_p", 0.9), ("temperature", 0.01)):
        setattr(model.generation_config, name, value)
    assert sample_answers(model, tokenizer, prompts, 10, seed=5) == plain, (
        "the checkpoint's generation_config reshapes the samples, so they are not the policy's and KL is wrong"
    )
    assert model.generation_config.top_k == 1, "sampling changes the model it was given"
    assert sample_answers(model, tokenizer, prompts, 10, seed=6) != plain, "--seed has no effect"


def test_answers_are_cached_by_weights_prompts_and_settings(monkeypatch: pytest.MonkeyPatch):
    model, tokenizer, prompts = tiny_gpt2(7), byte_tokenizer(), [[1, 2], [3]] * 4
    first = sample_cached(model, tokenizer, prompts, 10, seed=5)
    assert first == sample_answers(model, tokenizer, prompts, 10, seed=5), "the cache gives other answers"
    others = [
        sample_cached(tiny_gpt2(8), tokenizer, prompts, 10, seed=5),
        sample_cached(model, tokenizer, prompts, 10, seed=6),
        sample_cached(model, tokenizer, prompts, 10, seed=5, temperature=0.5),
        sample_cached(model, tokenizer, prompts[::-1], 10, seed=5),
    ]
    assert all(other != first for other in others), "another model's or setting's answers are taken for these"
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", None)  # were it sampled again, it would fail
        assert sample_cached(model, tokenizer, prompts, 10, seed=5) == first, "answers are sampled twice"
    for path in (Path(datasets.config.HF_DATASETS_CACHE) / "tinydpo-answers").iterdir():
        path.write_text(path.read_text()[:20])
    assert sample_cached(model, tokenizer, prompts, 10, seed=5) == first, "a damaged cache ends the evaluation"


@given(st.lists(st.integers(0, 9), max_size=20))
def test_cut_answer_properties(ids: list[int]):
    answer, ended = cut_answer(ids, [9])
    assert ids[: len(answer)] == answer and ended == (9 in ids), "an answer is not what the model wrote"
    assert 9 not in answer[:-1] and (not ended or answer[-1] == 9), "tokens after the end token count as answer"


def test_cut_prompt_keeps_the_end_and_the_begin_token():
    assert cut_prompt([1, 2, 3, 4], 4, None) == [1, 2, 3, 4], "a prompt that fits is cut"
    assert cut_prompt([1, 2, 3, 4], 2, None) == [3, 4], "the question at the prompt's end is cut away"
    assert cut_prompt([0, 1, 2, 3], 2, 0) == [0, 3], "the begin token that the model always saw is cut away"


def test_choose_prompts_is_seeded_and_without_duplicates():
    texts = Dataset.from_dict({"prompt": [f"p{i % 30}" for i in range(90)], "row": list(range(90))})
    assert choose_prompts(texts, 512, 0)["row"][:] == list(range(30)), "a prompt is asked twice or left out"
    chosen = choose_prompts(texts, 10, 0)["prompt"][:]
    assert len(set(chosen)) == 10, "--num_prompts is not kept"
    assert chosen == choose_prompts(texts, 10, 0)["prompt"][:], "the same seed asks other prompts"
    assert chosen != choose_prompts(texts, 10, 1)["prompt"][:], "another seed asks the same prompts"


def test_win_rate_counts_ties_half():
    metrics = reward_metrics(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 3.0, 5.0]))
    assert metrics["win_rate_vs_ref"] == 0.5, "one win, two ties and one loss must be even"
    assert (metrics["reward_policy"], metrics["reward_ref"]) == (1.5, 2.5), "mean rewards are wrong"


def test_reward_functions_are_summed_and_checked():
    def length(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
        return [float(len(text)) for text in completions]

    assert sum_rewards([length, length], ["p", "q"], ["ab", ""]).tolist() == [4.0, 0.0], (
        "several rewards are not summed"
    )
    for broken in (lambda **_: [1.0], lambda **_: [None, 1.0], lambda **_: [math.nan, 1.0], lambda **_: 1 / 0):
        with pytest.raises(UserError, match="reward function"):
            sum_rewards([broken], ["p", "q"], ["ab", ""])


@pytest.mark.parametrize("name", ["no_dot", "no.such.module.f", "json.no_such_function", "json.__doc__"])
def test_unknown_reward_is_one_sentence(name: str):
    with pytest.raises(UserError, match="--reward_funcs") as caught:
        load_reward(name)
    assert "\n" not in str(caught.value) and name in str(caught.value), "the message does not name the function"


def test_reward_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_rewards_for_test.py").write_text("def one(prompts, completions, **kwargs):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward("my_rewards_for_test.one")(prompts=[""], completions=[""]) == [1.0], (
        "a local reward is not found"
    )


def test_different_vocabularies_are_refused():
    other = byte_tokenizer()
    check_same_vocabulary(byte_tokenizer(), other)
    other.add_tokens(["<new>"])
    with pytest.raises(UserError, match=r"different vocabularies.*<new>"):
        check_same_vocabulary(byte_tokenizer(), other)


def test_arguments_take_beta_and_length_from_the_policy_run(tmp_path: Path):
    policy = tmp_path / "dpo"
    (policy / "checkpoint-10").mkdir(parents=True)
    needed = {"ref_model_name_or_path": "sft", "output_dir": "out"}
    assert EvaluateArguments(str(policy), **needed).beta == 0.1, "a policy without a run has no β to evaluate with"
    (policy / "run_config.yaml").write_text(yaml.safe_dump({"beta": 0.4, "max_length": 96}))
    for folder in (policy, policy / "checkpoint-10"):
        args = EvaluateArguments(str(folder), **needed)
        assert (args.beta, args.max_length) == (0.4, 96), "the policy is not evaluated at its own β and length"
    assert EvaluateArguments(str(policy), **needed, beta=0.2).beta == 0.2, "--beta has no effect"
    for wrong in ({"output_dir": None}, {"num_prompts": 0}, {"temperature": 0.0}, {"max_length": 1}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvaluateArguments(str(policy), **{**needed, **wrong})


def test_chance_is_not_sold_as_a_win():
    assert "not told apart" in format_interval((0.48, 0.56)), "a difference within noise is read as a win"
    assert "not told apart" not in format_interval((0.51, 0.6)), "a real difference is read as noise"


def test_evaluate_script_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for seed, role in enumerate(("policy", "ref")):
        tiny_gpt2(seed).save_pretrained(tmp_path / role)
        byte_tokenizer().save_pretrained(tmp_path / role)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [
            {
                "chosen": f"\n\nHuman: {split} {i}?\n\nAssistant: Yes {i}.",
                "rejected": f"\n\nHuman: {split} {i}?\n\nAssistant: No, never {i}!",
            }
            for i in range(12)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards_for_test.py").write_text(
        "def length(prompts, completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    (tmp_path / "policy/README.md").write_text("# Card\n\n## Evaluation\n\nof old\n\n## Content notice\n\nkept\n")
    (tmp_path / "policy/train_results.json").write_text("{}")
    argv = "evaluate.py --model_name_or_path policy --ref_model_name_or_path ref --dataset_name data --output_dir out"
    argv += " --num_prompts 8 --reward_funcs rewards_for_test.length"
    monkeypatch.setattr(sys, "argv", argv.split())
    script.main()

    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert set(results) >= PROMISED, f"eval_results.json lacks {PROMISED - set(results)}"
    assert results["pairs"] == 12 and results["beta"] == 0.1, "other pairs, or another β, than the held-out ones"
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and {"prompt", "policy", "ref", "reward_policy", "reward_ref"} <= set(samples[0]), (
        "samples.jsonl does not hold both answers to every prompt"
    )
    for sample in samples:
        assert "".join(sample["pieces"]).removesuffix("<end>") == sample["policy"], "the report colours another answer"
        assert len(sample["pieces"]) == len(sample["token_rewards"])
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert np.mean([pair["margin"] > 0 for pair in pairs]) == results["reward_accuracy"], "pairs.jsonl tells otherwise"
    token_sums = [sum(sample["token_rewards"]) for sample in samples]
    assert np.mean(token_sums) == pytest.approx(0.1 * results["kl_per_sequence"], rel=1e-5), (
        "tokens do not add up to KL"
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "eval_results.json",
        "pairs.jsonl",
        "samples.jsonl",
    ], "the evaluation leaves partial files behind"
    assert (tmp_path / "report.html").is_file(), "no report is written"
    card = (tmp_path / "policy/README.md").read_text()
    assert f"| reward accuracy | {results['reward_accuracy']:.3f} (" in card, "the card lacks the evaluation's figures"
    assert "of old" not in card and card.endswith("## Content notice\n\nkept\n"), "the card's other parts are changed"
    out = capsys.readouterr().out
    assert format_table(results) in out and format_samples(samples[:3]) in out, "what is printed is not what is saved"
    assert "BIASED" in out, "the earlier script's figure is not marked as biased"

    monkeypatch.setattr(sys, "argv", [*argv.split(), "--model_name_or_path", "./no/such/folder"])
    with pytest.raises(UserError, match="no/such/folder"):
        script.main()
