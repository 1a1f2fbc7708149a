"""Win rates: no verdict is paid for twice, no secret leaks, and rates are no surer than the data."""

import gc
import html
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import winrate as winrate_script
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import Script, judge_server, make_reply

from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation import judge as judge_module
from tinydpo.evaluation.judge import Judge, JudgeArguments, measure_agreement, read_verdict
from tinydpo.evaluation.winrate import (
    RIDGE,
    cut_answers,
    format_caveats,
    format_winrates,
    length_controlled_rate,
    summarize_verdicts,
)
from tinydpo.files import read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "sk-secret-of-the-test"
PAIRS = [("good", "bad"), ("bad", "good"), ("bad", "worse"), ("same", " same\n")]
HONEST = [("A", "B"), ("B", "A"), ("tie", "tie"), ("tie", "tie")]  # an honest judge's verdicts on them
VERDICTS = st.tuples(*[st.sampled_from(["A", "B", "tie", "invalid"])] * 2)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """No key of whoever runs the tests goes anywhere."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)


def get_sides(question: str) -> tuple[str, str]:
    """The replies A and B."""
    return tuple(question.split(f"[reply {name}]\n")[1].split(f"\n[end of reply {name}]")[0] for name in "AB")


def judge_honestly(question: str, before: int = 0) -> str:
    """Prefer the reply with "good" in it; a tie if both or neither have it."""
    a, b = get_sides(question)
    verdict = "tie" if ("good" in a) == ("good" in b) else "A" if "good" in a else "B"
    return f"One of them helps.\nMore helpful: {verdict}"


def make_judge(url: str, folder: Path, **arguments: Any) -> Judge:
    pytest.importorskip("openai", reason="the judge's client is an extra: pip install '.[judge]'")
    return Judge(JudgeArguments(url, "scripted", **arguments), folder / "verdicts.jsonl")


def ask_about(judge: Judge, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[str, str]]:
    return judge.compare([f"q{i}" for i in range(len(pairs))], *zip(*pairs, strict=True), desc="judge")


def test_each_pair_is_asked_in_both_orders(tmp_path: Path):
    with judge_server(lambda question, _: time.sleep(0.05) or judge_honestly(question)) as server:
        judge = make_judge(server.url, tmp_path, judge_concurrency=3)
        assert ask_about(judge) == HONEST
    assert len(server.questions) == 6, "a pair is not asked once in each order, or equal answers are paid for"
    assert server.most_at_once == 3, "--judge_concurrency is not what is asked at once"
    expected = {"prompt": 60, "completion": 12, "verdicts_asked": 6, "verdicts_cached": 0}
    assert judge.count_tokens() == expected, "the token count is not the sum of what the endpoint counted"
    assert server.keys == {f"Bearer {KEY}"}, "the key from the environment is not used"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is kinder.\nMore helpful: A", "A"),
        ("more helpful: Reply A.", "A"),
        ("More helpful: **TIE**", "tie"),
        ("B", "B"),
        ("More helpful: A\nMore helpful: B", "B"),
        ("Comparison: B is kinder than A. More helpful: B", "B"),
        ("", "invalid"),
        ("More helpful: A\nThat is all.", "invalid"),
        ("More helpful: a", "invalid"),
        ("More helpful: A, B", "invalid"),
        ("I cannot say which reply is more helpful: A", "invalid"),
        ("The answer to the question is:\n\n[reply B]", "invalid"),
    ],
)
def test_verdicts_are_read_from_the_last_line(reply: str, verdict: str):
    assert read_verdict(reply) == verdict


def test_verdicts_are_read_at_once():
    began = time.monotonic()
    assert read_verdict("More helpful" + ":" * 30_000 + "x") == "invalid"
    assert time.monotonic() - began < 2, "a hostile reply keeps the reader busy"


@pytest.mark.parametrize(
    "reply",
    [
        "\x00garbage",
        make_reply(None, refusal="I must not."),
        {"status": 400, "error": {"code": "content_filter", "message": "filtered"}},
    ],
    ids=["garbage", "refusal", "content filter"],
)
def test_unreadable_replies_are_invalid_and_kept(reply: Any, tmp_path: Path):
    with judge_server(lambda *_: reply) as server:
        verdicts = ask_about(make_judge(server.url, tmp_path))
        assert ask_about(make_judge(server.url, tmp_path)) == verdicts
    assert verdicts == [("invalid", "invalid")] * 3 + [("tie", "tie")]
    assert len(server.questions) == 6, "an invalid verdict, which was paid for, is asked again"
    figures = summarize_verdicts(verdicts, *zip(*PAIRS, strict=True))
    assert (figures["invalid"], figures["ties"], figures["win_rate"]) == (3, 1, 0.5)


def test_a_reply_that_is_cut_short_is_asked_for_again_with_more_room(tmp_path: Path):
    def think_first(question: str, before: int) -> Any:
        if server.bodies[-1]["max_tokens"] < 1000:
            return make_reply("A\n\nB\n\nA", finish_reason="length")
        return judge_honestly(question)

    with judge_server(think_first) as server:
        assert ask_about(make_judge(server.url, tmp_path, judge_concurrency=1)) == HONEST


@pytest.mark.parametrize("more_room", [make_reply("A\n\nB\n\nA", finish_reason="length"), 400])
def test_a_reply_that_stays_cut_is_no_verdict(more_room: Any, tmp_path: Path):
    def ramble(question: str, before: int) -> Any:
        return make_reply("A\n\nB\n\nA", finish_reason="length") if before == 0 else more_room

    with judge_server(ramble) as server:
        verdicts = ask_about(make_judge(server.url, tmp_path))
    assert verdicts == [("invalid", "invalid")] * 3 + [("tie", "tie")], "a cut reply is taken for a verdict"


def test_passing_faults_are_retried(tmp_path: Path):
    with judge_server(lambda question, before: (429, 500, judge_honestly(question))[before]) as server:
        judge = make_judge(server.url, tmp_path)
        assert ask_about(judge) == HONEST and len(server.questions) == 18
    assert judge.count_tokens()["verdicts_asked"] == 6, "a retried question counts twice"


def test_a_lasting_fault_keeps_what_was_paid_for(tmp_path: Path):
    def fail_after_three(question: str, before: int) -> Any:
        return 500 if len(set(server.questions)) > 3 else judge_honestly(question)

    with judge_server(fail_after_three) as server:
        judge = make_judge(server.url, tmp_path, judge_concurrency=1)
        with pytest.raises(UserError, match=r"500.*3 verdicts are saved.*run the same command again") as caught:
            ask_about(judge)
        assert KEY not in str(caught.value), "the endpoint's error message gives the key away"
        with (tmp_path / "verdicts.jsonl").open("a") as file:
            file.write('"no row"\n{"key": 1}\n{"key": "half a li')  # as if killed while writing
        server.script = judge_honestly
        server.questions.clear()
        again = make_judge(server.url, tmp_path)
        assert ask_about(again) == HONEST and len(server.questions) == 3, "paid verdicts are asked for again"
        assert again.count_tokens() == {"prompt": 60, "completion": 12, "verdicts_asked": 3, "verdicts_cached": 3}
        assert ask_about(make_judge(server.url, tmp_path)) == HONEST
        assert len(server.questions) == 3, "a half-written line spoils the ones written after it"


@pytest.mark.parametrize("usage", [{"prompt_tokens": "7", "completion_tokens": [1]}, "many"])
def test_nonsense_in_usage_loses_no_verdict(usage: Any, tmp_path: Path):
    with judge_server(lambda question, _: make_reply(judge_honestly(question)) | {"usage": usage}) as server:
        judge = make_judge(server.url, tmp_path)
        assert ask_about(judge) == HONEST
    tokens = judge.count_tokens()
    assert (tokens["prompt"], tokens["completion"]) == (0, 0), "what is no number is counted"


def test_refused_settings_are_left_out_from_then_on(tmp_path: Path, capsys: pytest.CaptureFixture):
    def refuse_like_a_reasoning_model(question: str, before: int) -> Any:
        for name in ("max_tokens", "temperature"):
            if name in server.bodies[-1]:
                message = f"Unsupported: '{name}' does not work with this model."
                return {"status": 400, "error": {"message": message, "param": name, "code": "unsupported_value"}}
        return judge_honestly(question)

    with judge_server(refuse_like_a_reasoning_model) as server:
        assert ask_about(make_judge(server.url, tmp_path, judge_concurrency=1)) == HONEST
    assert len(server.questions) == 2 + 6, "what was refused once is sent again"
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    err = capsys.readouterr().err
    for name in ("max_tokens", "temperature"):
        assert err.count(f"scripted refuses {name}; asking with") == 1, f"{name} is changed without a line"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (lambda *_: 401, "refuses the key (401); set JUDGE_API_KEY"),
        (lambda *_: 404, "answers 404; check --judge_model, and --judge_base_url"),
        (lambda *_: 429, "answers 429"),
        (lambda *_: b"<html>", "does not answer in OpenAI's chat protocol"),
        (lambda *_: {"choices": []}, "does not answer in OpenAI's chat protocol"),
        (lambda *_: time.sleep(0.5) or "A", "no reply within 0.05 s, 2 times; raise --judge_timeout"),
        (None, "cannot be reached"),
    ],
)
def test_lasting_faults_are_one_sentence(
    script: Script | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
):
    monkeypatch.setattr(judge_module, "RETRIES", 1)
    with judge_server(script) as server:
        url = server.url if script else "http://127.0.0.1:9/v1"  # port 9: nobody listens
        with pytest.raises(SystemExit), report_errors():
            ask_about(make_judge(url, tmp_path, judge_timeout=0.05 if "0.05" in sentence else 30))
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1, f"the fault is not one sentence: {err}"
    assert KEY not in err, "the key is printed"
    assert "0 verdicts are saved" in err, "a failure is stored as a verdict"
    gc.collect()
    assert not caplog.text, "tracebacks of the other questions stand below the sentence"


def test_ctrl_c_is_one_sentence_at_once_and_keeps_the_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture):
    over = threading.Event()

    def press_ctrl_c_after_five(*_: Any) -> str:
        if len(server.questions) > 5:
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(20)
        return "More helpful: A"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    try:
        with judge_server(press_ctrl_c_after_five) as server:
            judge = make_judge(server.url, tmp_path, judge_concurrency=2)
            began = time.monotonic()
            with pytest.raises(SystemExit) as caught, report_errors():
                ask_about(judge, [("good", f"bad {i}") for i in range(20)])
            waited = time.monotonic() - began
            over.set()
    finally:
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert caught.value.code == 130 and waited < 10, f"Ctrl-C ended it after {waited:.0f} s"
    assert "interrupted; run the same command again" in err and err.count("\n") == 1, f"Ctrl-C shows {err}"
    assert 1 <= (tmp_path / "verdicts.jsonl").read_text().count("\n") <= 5, "what was paid for is lost"


def test_another_model_is_asked_anew_and_an_echoed_key_is_not_stored(tmp_path: Path):
    with judge_server(lambda *_: f"Your key is {KEY}.\nMore helpful: A") as server:
        for model in ("scripted", "another"):
            judge = make_judge(server.url, tmp_path)
            judge.args.judge_model = model
            ask_about(judge, PAIRS[:1])
    assert len(server.questions) == 4, "one judge's verdicts are taken for another's"
    assert KEY not in (tmp_path / "verdicts.jsonl").read_text(), "the key reaches the disk"


def test_a_local_server_needs_no_key_and_a_broken_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JUDGE_API_KEY")
    with judge_server(judge_honestly) as server:
        assert ask_about(make_judge(server.url, tmp_path)) == HONEST
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="characters that no key has"):
        make_judge("http://127.0.0.1:1/v1", tmp_path)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"judge_model": ""}, "--judge_model is missing"),
        ({"judge_base_url": "http://me:pass@host/v1"}, "judge_base_url must not contain a user"),
        ({"judge_base_url": "http://host/v1?api_key=pass"}, "judge_base_url must not contain a user"),
    ],
)
def test_judge_needs_an_address_without_a_secret(wrong: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named) as caught:
        JudgeArguments(**{"judge_base_url": "http://host/v1", "judge_model": "m", **wrong})
    assert "pass@" not in str(caught.value) and "=pass" not in str(caught.value)


def simulate(n: int, rate: float, effect: float, longer: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of answers `longer` words longer on average, whose logit rises by `effect` a standard deviation."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(longer, 10, n)
    logits = np.log(rate / (1 - rate)) + effect * differences / 10
    return (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float), differences


def test_length_control_is_the_intercept_of_a_logistic_regression():
    outcomes, differences = simulate(500, 0.6, 1.0, 8, seed=0)
    outcomes[:50] = 0.5
    x = differences / np.sqrt((differences**2).mean())
    intercept = slope = 0.0
    for _ in range(20_000):  # plain gradient descent on the same penalized likelihood
        error = 1 / (1 + np.exp(-intercept - slope * x)) - outcomes
        intercept -= 0.002 * (error.sum() + RIDGE * intercept)
        slope -= 0.002 * ((error * x).sum() + RIDGE * slope)
    rate, low, high = length_controlled_rate(outcomes, differences)
    assert rate == pytest.approx(1 / (1 + np.exp(-intercept)), abs=1e-6)
    assert low < rate < high


def test_a_side_that_always_wins_is_better_at_equal_length_too():
    differences = np.random.default_rng(0).normal(0, 10, 32)
    _, low, high = length_controlled_rate(np.ones(32), differences)
    assert low > 0.85 and high > 0.99, "32 wins of 32 would be called inconclusive"


def test_the_interval_covers_the_rate_as_often_as_it_says():
    held = 0
    for seed in range(300):
        _, low, high = length_controlled_rate(*simulate(200, 0.6, 1.0, 8, seed))
        held += low <= 0.6 <= high
    assert 0.91 < held / 300 < 0.99, f"the 95 % interval covers the true rate in {held / 300:.0%} of 300 runs"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-10_000, 10_000)), min_size=1, max_size=40))
def test_length_control_is_a_rate_and_has_no_side(rows: list[tuple[float, int]]):
    outcomes, differences = np.array(rows).T
    rate, low, high = length_controlled_rate(outcomes, differences)
    assert 0 <= low <= rate <= high <= 1
    swapped, *_ = length_controlled_rate(1 - outcomes, -differences)
    assert swapped == pytest.approx(1 - rate, abs=1e-5), "policy and opponent are not treated alike"


@given(st.lists(VERDICTS, min_size=1).filter(lambda pairs: any("invalid" not in pair for pair in pairs)))
def test_agreement_with_the_labels_counts_every_pair_once(verdicts: list[tuple[str, str]]):
    figures = measure_agreement(verdicts)
    invalid = sum("invalid" in pair for pair in verdicts)
    assert figures["invalid"] == invalid
    assert figures["agreed"] + figures["ties"] + figures["disagreed"] + invalid == len(verdicts) == figures["pairs"]
    assert figures["agreement"] * (len(verdicts) - invalid) == pytest.approx(figures["agreed"] + figures["ties"] / 2)
    swapped = measure_agreement([(second, first) for first, second in verdicts])
    assert swapped["agreement"] == pytest.approx(1 - figures["agreement"]), "the labels' side has an advantage"
    assert swapped["order_flip_rate"] == figures["order_flip_rate"]


def test_doubts_stand_beside_the_rates():
    few, many = {"invalid": 1, "prompts": 100}, {"invalid": 7, "prompts": 25}
    assert format_caveats({}, few) == "" and format_caveats({}, many) == "; 28% of the pairs are invalid"
    for interval, doubt in (((0.6, 0.9), ""), ((0.1, 0.6), "includes 0.5"), ((0.1, 0.4), "sides against the labels")):
        caveats = format_caveats({"calibration": {"agreement_ci95": interval}}, few)
        assert doubt in caveats and bool(doubt) == bool(caveats)


def test_chosen_answers_get_the_room_of_sampled_ones(tiny_tokenizer: Any):
    ids = tiny_tokenizer([" one two three four five"]).input_ids[0]
    cut = cut_answers([" one two three four five", " one"], tiny_tokenizer, 3)
    assert cut == [tiny_tokenizer.decode(ids[:3]), " one"]


@pytest.fixture
def policy(task: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A finished run, which gives the data and the budget."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "policy"))
    (folder / "README.md").write_text("# Card\n\n## Evaluation\n\nfigures\n\n## Content notice\n\nkept\n")
    (folder / "train_results.json").write_text("{}")
    settings = {"model_name_or_path": str(task / "base"), "dataset_name": str(task / "data"), "max_length": 64,
                "max_question_length": 32}  # fmt: skip
    (folder / "run_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def get_flags(policy: Path, out: Path, url: str) -> list[str]:
    flags = {
        "model_name_or_path": policy, "output_dir": out, "num_prompts": 6,
        "judge_base_url": url, "judge_model": "scripted", "calibration_pairs": 12,
    }  # fmt: skip
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_the_script_from_end_to_end(task: Path, policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "run" / "winrate"
    with judge_server(lambda *_: "More helpful: tie") as server:
        argv = [*get_flags(policy, out, server.url), "--temperatures", "0.5", "1.0"]
        winrate_script.main(argv)
        first = json.loads((out / "winrate.json").read_text())
        asked = len(server.questions)
        winrate_script.main(argv)
        assert len(server.questions) == asked, "the same command pays again"
    again = json.loads((out / "winrate.json").read_text())
    assert first["settings"]["dataset_name"] == str(task / "data") and first["settings"]["max_length"] == 64
    compared = [(comparison["opponent"], comparison["temperature"]) for comparison in first["comparisons"]]
    assert compared == [("chosen", 0.5), ("ref", 0.5), ("chosen", 1.0), ("ref", 1.0)]
    assert all(c["prompts"] == c["ties"] == 6 and c["win_rate"] == 0.5 for c in first["comparisons"])
    assert again["comparisons"] == first["comparisons"] and again["tokens"]["verdicts_asked"] == 0
    assert again["tokens"]["prompt"] == first["tokens"]["prompt"] == 10 * asked, "cached verdicts lose their tokens"
    assert sorted(path.name for path in out.iterdir()) == ["verdicts.jsonl", "winrate.json"], "partial files are left"
    printed = "".join(capfd.readouterr())
    assert format_winrates(first) in printed and printed.count("includes 0.5: inconclusive") == 2 * (1 + 4 * 3)
    everything = printed + "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in everything, "the key is in a file or in the output"


def test_judge_is_judged_by_the_labels_first(
    task: Path, policy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    rows = read_jsonl(task / "data/test.jsonl")
    labels = {tuple(row[side].rpartition("Assistant:")[2].strip() for side in ("chosen", "rejected")) for row in rows}

    def prefer_chosen(question: str, _: int) -> str:
        a, b = get_sides(question)
        return f"More helpful: {'A' if (a, b) in labels else 'B' if (b, a) in labels else 'tie'}"

    with judge_server(prefer_chosen) as server:
        winrate_script.main([*get_flags(policy, tmp_path / "knows/winrate", server.url)])
    about_labels = [
        get_sides(question) in labels or get_sides(question)[::-1] in labels for question in server.questions
    ]
    own = json.loads((tmp_path / "knows/winrate/winrate.json").read_text())["calibration"]
    assert (own["pairs"], own["agreed"], own["agreement"], own["order_flip_rate"]) == (12, 12, 1.0, 0.0)
    assert about_labels[:24] == [True] * 24 and not any(about_labels[24:]), "the labelled pairs do not come first"
    shown = capfd.readouterr().out
    assert "share of 12 held-out pairs on which scripted agrees with the labels" in shown
    assert "95 % interval" in shown and "95 % between" not in shown
    assert "share of 12 held-out pairs on which scripted" in (tmp_path / "knows/report.html").read_text()
    card = (policy / "README.md").read_text()
    assert "| the judge's agreement | 1.000 (" in card
    assert "## Evaluation\n\nfigures\n\n## Content notice\n\nkept" in card, "the card's other parts are changed"

    with judge_server(lambda *_: "More helpful: A") as server:  # goes by the order
        winrate_script.main([*get_flags(policy, tmp_path / "order/winrate", server.url)])
    own = json.loads((tmp_path / "order/winrate/winrate.json").read_text())["calibration"]
    assert (own["agreement"], own["order_flip_rate"]) == (0.5, 1.0)
    warning = "the interval of the judge's agreement with the labels includes 0.5: inconclusive"
    assert capfd.readouterr().out.count(f"; {warning}\n") == 2, "the rates of such a judge have no warning"
    assert warning in html.unescape((tmp_path / "order/report.html").read_text()), "the report hides it"
    card = (policy / "README.md").read_text()
    assert card.count("## Win rates by a judge") == 1 and warning in card, "the card hides it"


def test_judge_without_a_readable_verdict_is_refused(tmp_path: Path):
    unreadable = r"none of scripted's verdicts \(judge\) can be read"
    with judge_server(lambda *_: "no") as server, pytest.raises(UserError, match=unreadable):
        ask_about(make_judge(server.url, tmp_path), PAIRS[:3])
