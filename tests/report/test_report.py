"""The report: one page that shows what is there, safe with any text, and says no more than the figures do."""

import importlib
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tinydpo.data.notice import CONTENT_NOTICE
from tinydpo.errors import UserError
from tinydpo.evaluation.on_policy import add_rounds_to_frontier
from tinydpo.evaluation.table import headline_rows
from tinydpo.report import figures
from tinydpo.report.page import group_pairs_by_length, group_pairs_by_subset, write_report

VOID = {"meta", "br", "use"}
RESULTS = {
    "pairs": 40, "reward_accuracy": 0.55, "reward_accuracy_ci95": [0.398, 0.693], "reward_margin": 0.3,
    "reward_margin_se": 0.05, "dpo_loss": 0.66, "beta": 0.1, "nll_chosen_policy": 2.5, "nll_chosen_ref": 2.4,
    "raw_likelihood_accuracy_policy": 0.5, "raw_likelihood_accuracy_ref": 0.5, "kl_per_sequence": 3.0,
    "kl_per_sequence_se": 0.2, "kl_per_token": 0.1, "mean_length_policy": 30.0, "mean_length_ref": 28.0,
    "ended_policy": 0.9, "ended_ref": 0.8,
    "settings": {
        "model_name_or_path": "/home/someone/secret/dpo", "ref_model_name_or_path": "me/sft", "max_length": 128,
        "num_prompts": 30, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "reward_funcs": None, "seed": 7,
        "dtype": "float32", "dataset_name": "my/pairs", "dataset_revision": "abc123",
    },
}  # fmt: skip
SECTIONS = {
    "evaluation/eval_results.json": "raw likelihood accuracy",
    "evaluation/pairs.jsonl": 'id="held-out-pairs"',
    "evaluation/samples.jsonl": 'id="answers"',
    "frontier/frontier.json": 'id="frontier"',
    "winrate/winrate.json": 'id="win-rates"',
    "dpo/trainer_state.json": 'id="training"',
}


def sample(text: str = "Yes.", tokens: int = 3) -> dict[str, Any]:
    answers = {"prompt": text, "policy": text, "ref": text, "chosen": text, "ended_policy": True, "ended_ref": False}
    return answers | {"pieces": [text[:60]] * tokens, "token_rewards": [0.1 * (-1) ** i for i in range(tokens)]}


def make_pairs(n: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"margin": rng.gauss(0.3, 1), "chosen_tokens": rng.randint(1, 60), "rejected_tokens": rng.randint(1, 60),
         "subset": rng.choice(["harmless $x$", "helpful <b>"])}
        for _ in range(n)
    ]  # fmt: skip


def make_frontier() -> dict[str, Any]:
    points = [
        {"curve": curve, "loss": "sigmoid", "beta": beta, "seed": 0, "step": step, "kl": step / 50 / beta,
         "kl_se": 0.1, "reward": step / 100, "reward_se": 0.1}
        for curve in figures.METHODS for beta in (0.1, 1.0) for step in (50, 100)
    ]  # fmt: skip
    best = [{"n": n, "kl": math.log(n) - (n - 1) / n, "reward": math.log(n), "reward_se": 0.1} for n in (1, 2, 4)]
    sft = {"kl": 0.0, "reward": 0.0, "reward_se": 0.1}
    failed = [{"name": "ipo-beta5-seed0", "error": "/home/someone/secret is full"}]
    return {"settings": {}, "reward": "gold", "points": points, "sft": sft, "best_of_n": best, "failed": failed}


def make_winrate(temperatures: tuple[float, ...] = (1.0,)) -> dict[str, Any]:
    comparisons = [
        {"opponent": opponent, "temperature": temperature, "prompts": 50, "wins": 28, "ties": 0, "losses": 20,
         "invalid": 2, "win_rate": 0.58, "win_rate_ci95": [0.44, 0.71], "length_controlled_win_rate": 0.5,
         "length_controlled_ci95": [0.3, 0.7], "mean_length_policy": 30.0, "mean_length_opponent": 40.0}
        for opponent in ("chosen", "ref") for temperature in temperatures
    ]  # fmt: skip
    return {"settings": {}, "judge": "a judge", "comparisons": comparisons}


def make_folder(folder: Path) -> Path:
    """A run folder with every part."""
    for name in ("evaluation", "frontier", "winrate", "dpo"):
        (folder / name).mkdir(parents=True)
    log = [{"step": step, "loss": 0.7 - step / 100, "rewards/accuracies": 0.5} for step in range(10)]
    texts = {
        "evaluation/eval_results.json": json.dumps(RESULTS),
        "evaluation/pairs.jsonl": lines(make_pairs(40)),
        "evaluation/samples.jsonl": lines([sample(f"answer {i}") for i in range(30)]),
        "frontier/frontier.json": json.dumps(make_frontier()),
        "winrate/winrate.json": json.dumps(make_winrate()),
        "dpo/trainer_state.json": json.dumps({"log_history": log}),
        "dpo/environment.json": json.dumps({"seed": 11, "git_commit": "c0ffee", "packages": {"torch": "2.13.0"}}),
        "dpo/run_config.yaml": yaml.safe_dump({"dataset_name": "my/pairs", "beta": 0.1, "loss_type": ["sigmoid"]}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "my-run")


class Page(HTMLParser):
    """What a browser would make of a page: its text and its tags, which must all be closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text, self.ids, self.loaded = [], [], "", [], []
        self.feed(self.raw)
        self.close()
        assert not self.open, f"{self.open} are not closed: the page breaks there"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.loaded += [v for n, v in attrs if n in ("src", "href", "xlink:href", "srcset", "data") and tag != "a"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing: text was taken for a tag"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_whole_page(folder: Path):
    page = Page(write_report(folder))
    for name, section in SECTIONS.items():
        assert section in page.raw, f"{name} is there, but the page does not show it"
    assert all(link.startswith("#") for link in page.loaded), f"the page loads {page.loaded}: it needs the network"
    assert not {"script", "link", "img", "iframe"} & set(page.tags), "the page is not self-contained"
    assert "@import" not in page.raw and "url(http" not in page.raw, "the style loads something"
    assert len(page.ids) == len(set(page.ids)), "two figures share an id: one shows the other's parts"
    assert "prefers-color-scheme: dark" in page.raw and "width=device-width" in page.raw, "no dark mode, or no phone"
    assert "#000000" not in page.raw, "a figure has black ink: it cannot be read on a dark page"
    for told in ("seed", "11", "c0ffee", "torch 2.13.0", "abc123", "my/pairs", "ipo-beta5-seed0"):
        assert told in page.text, f"{told!r} is not on the page: seeds, versions, data and failures must be"
    assert "secret" not in page.raw, "a local path stands on a page that may be passed on"
    assert page.tags.count("article") == 20 and "20 of 30" in page.text, (
        "not twenty prompts, or it is not said of what"
    )
    assert list(folder.glob(".*")) == [], "partial files are left behind"


def test_figures_are_labelled(folder: Path):
    text = Page(write_report(folder)).text
    for label in (
        "KL(policy ‖ reference), nats per answer", "mean reward: gold", "conservative DPO", "best of N = 4",
        "implicit reward of chosen minus rejected, β × nats", "held-out pairs", "reward accuracy, share of pairs",
        "policy's win rate, ties half", "optimizer step", "chance", "harmless $x$",
    ):  # fmt: skip
        assert label in text, f"no figure says {label!r}: axes, or curves, are without their names"


@pytest.mark.parametrize("missing", SECTIONS)
def test_parts_are_optional(folder: Path, missing: str):
    (folder / missing).unlink()
    page = Page(write_report(folder))
    assert SECTIONS[missing] not in page.raw, f"without {missing} the page shows a section about nothing"
    others = [section for name, section in SECTIONS.items() if name != missing]
    assert all(section in page.raw for section in others), f"without {missing} other sections are gone as well"


@pytest.mark.parametrize("only", SECTIONS)
def test_one_part_is_enough(folder: Path, only: str):
    for name in {*SECTIONS, "dpo/environment.json", "dpo/run_config.yaml"} - {only}:
        (folder / name).unlink()
    assert SECTIONS[only] in Page(write_report(folder)).raw, f"{only} alone is not shown"


@pytest.mark.parametrize("name", SECTIONS)
def test_damaged_file_is_named_and_the_old_page_stays(folder: Path, name: str):
    (folder / "report.html").write_text("the one before")
    for broken in (lambda text: text[:-9], lambda text: "[1]\n"):
        text = (folder / name).read_text()
        (folder / name).write_text(broken(text))
        with pytest.raises(UserError, match=str(Path(name).name)) as error:
            write_report(folder)
        assert "damaged" in str(error.value) and "\n" not in str(error.value), "it is not told in one sentence"
        (folder / name).write_text(text)
    assert (folder / "report.html").read_text() == "the one before", "a failed report destroyed the one before"


def test_evaluation_of_another_name_is_found(folder: Path):
    (folder / "evaluation").rename(folder / "out")  # --output_dir is the user's to choose
    assert "raw likelihood accuracy" in Page(write_report(folder)).text, "an evaluation elsewhere is not reported"


def test_results_of_another_form_are_refused(folder: Path):
    (folder / "evaluation/eval_results.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(UserError, match="eval_results"):
        write_report(folder)


def test_nothing_to_report(tmp_path: Path):
    for empty in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="make evaluate"):
            write_report(empty)


def test_same_files_same_bytes(folder: Path):
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes(), "reports cannot be compared"


HOSTILE = st.one_of(
    st.text(),
    st.text(alphabet=st.characters(exclude_categories=()), max_size=40),  # half surrogates and controls too
    st.sampled_from(["<script>alert(1)</script>", "</style></div><img src=x onerror=y>", '" onmouseover="', "\0", "‮"]),
)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(HOSTILE, min_size=1, max_size=4))
def test_any_text_is_safe(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "evaluation").mkdir()
    (folder / "evaluation/samples.jsonl").write_text(lines([sample("Tame.", tokens=2) for _ in texts]))
    tame = Page(write_report(folder))
    (folder / "evaluation/samples.jsonl").write_text(lines([sample(text, tokens=2) for text in texts]))
    page = Page(write_report(folder))
    folds = {"details", "summary"}
    assert [tag for tag in page.tags if tag not in folds | {"div"}] == [
        t for t in tame.tags if t not in folds | {"div"}
    ], "a model's answer became part of the page"
    assert not set(map(chr, (*range(9), 11, 12, *range(14, 32)))) & set(page.raw), (
        "control characters stand on the page"
    )


@settings(max_examples=10, deadline=None)
@given(name=HOSTILE)
def test_any_name_is_safe(tmp_path_factory: pytest.TempPathFactory, name: str):
    folder = tmp_path_factory.mktemp("names")
    (folder / "evaluation").mkdir()
    (folder / "winrate").mkdir()
    pairs = [pair | {"subset": name} for pair in make_pairs(5)]
    (folder / "evaluation/pairs.jsonl").write_text(lines(pairs))
    (folder / "winrate/winrate.json").write_text(json.dumps(make_winrate() | {"judge": name}))
    assert not {"script", "img"} & set(Page(write_report(folder)).tags), "a subset's or judge's name became a tag"


def test_large_samples_stay_small_and_long_prompts_fold(folder: Path):
    text = "<&\"'" * 5_000
    (folder / "evaluation/samples.jsonl").write_text(lines([sample(text, tokens=5_000) for _ in range(25)]))
    size = write_report(folder).stat().st_size
    assert size < 3e6, f"the page has {size:,} bytes"
    (folder / "evaluation/samples.jsonl").write_text(lines([sample("word " * 1_990 + "the end") for _ in range(20)]))
    page = Page(write_report(folder))
    assert page.tags.count("article") == 20 and page.tags.count("details") == 60, "long texts are not folded"
    assert page.raw.count("the end") >= 40, "of a long prompt not its end is in sight"


def test_content_notice_only_for_hh(folder: Path):
    assert CONTENT_NOTICE not in Page(write_report(folder)).text, "other people's data are called offensive"
    with_hh = RESULTS | {"settings": RESULTS["settings"] | {"dataset_name": "/data/hh-rlhf"}}
    (folder / "evaluation/eval_results.json").write_text(json.dumps(with_hh))
    assert CONTENT_NOTICE in Page(write_report(folder)).text, "HH's text is shown without its content notice"


def test_doubts_stand_beside_win_rates(folder: Path):
    judge = {"pairs": 64, "invalid": 0, "agreement": 0.5, "agreement_ci95": [0.4, 0.6], "turned_share": 0.75}
    winrate = make_winrate() | {"calibration": judge}
    winrate["comparisons"][0]["invalid"] = 14
    (folder / "winrate/winrate.json").write_text(json.dumps(winrate))
    text = Page(write_report(folder)).text
    assert text.count("28% of the pairs are invalid") == 2, "a rate without a quarter of its pairs stands there as any"
    # at each win rate, in the headline and in its table, and once of the judge itself
    assert text.count("not told apart from a coin") == 5, "a judge that goes by chance is not told as such"
    assert "75% of its verdicts turn with the order" in text, "it is not said that the judge goes by the order"


def test_noise_is_no_win(folder: Path):
    page = Page(write_report(folder))
    told = {row.label: row.says_nothing() for row in headline_rows(RESULTS)}
    assert told["reward accuracy"] and not told["reward margin"], "an interval that holds chance is read as a win"
    # reward accuracy and both win rates of the judge
    assert page.text.count("inconclusive") == 3, "a figure within noise stands there without a warning"


@given(
    st.lists(
        st.fixed_dictionaries(
            {"margin": st.floats(-3, 3), "chosen_tokens": st.integers(1, 50), "rejected_tokens": st.integers(1, 50)},
            optional={"subset": st.sampled_from(["a", "b"])},
        ),
        min_size=1,
    )
)
def test_groups_hold_every_pair_once(pairs: list[dict[str, Any]]):
    right = sum(pair["margin"] > 0 for pair in pairs)
    lengths, subsets = group_pairs_by_length(pairs), group_pairs_by_subset(pairs)
    assert (sum(g.n for g in lengths), sum(g.right for g in lengths)) == (len(pairs), right), (
        "pairs are lost or doubled"
    )
    longer = [max(pair["chosen_tokens"], pair["rejected_tokens"]) for pair in pairs]
    for low, high, n in ((*map(int, group.name.split(" to ")), group.n) for group in lengths):
        assert sum(low <= length <= high for length in longer) == n, "a group's name is not what it holds"
    assert len(lengths) <= 4 and all(group.n for group in lengths), "a length group is empty"
    assert sum(group.n for group in subsets) == sum("subset" in pair for pair in pairs), "subsets lose pairs"


def test_histogram_counts_every_pair():
    margins = [*np.random.default_rng(0).normal(size=200), 0.0, 1e9, -1e9]
    bars = figures.draw_margin_histogram(margins).axes[0].patches
    heights = {side: sum(b.get_height() for b in bars if (b.get_x() >= 0) == side) for side in (True, False)}
    assert heights == {True: sum(m > 0 for m in margins), False: sum(m <= 0 for m in margins)}, (
        "outliers, or ties, are missing from the histogram or stand on the wrong side"
    )
    for odd in ([], [0.0], [0.0, 0.0], [float("nan"), 1.0]):
        figures.to_svg(figures.draw_margin_histogram(odd), "x", "")  # nothing to see, but no crash either


def test_frontier_joins_last_checkpoints_in_the_mean_over_seeds():
    points = [
        {"curve": "DPO", "loss": "sigmoid", "beta": beta, "seed": seed, "step": step, "kl": kl + seed, "kl_se": 0.1,
         "reward": kl / 2 + seed, "reward_se": 0.1}
        for beta, end in ((1.0, 2.0), (0.1, 6.0)) for seed in (0, 1) for step, kl in ((100, end), (50, 9.0))
    ]  # fmt: skip
    drawn = [
        line.get_xydata().tolist()
        for line in figures.draw_frontier(make_frontier() | {"points": points}).axes[0].lines
    ]
    assert [[0.0, 0.0], [2.5, 1.5], [6.5, 3.5]] in drawn, "the curve is not SFT and the last checkpoints' mean"


ROUNDS = [
    {"name": name, "kl": kl, "kl_se": 0.1, "reward": 1 + kl / 4, "reward_se": 0.1,
     "rewards": {"gold": {"mean": kl, "se": 0.1}, "proxy": {"mean": 2 * kl, "se": 0.2}}}
    for name, kl in (("SFT", 0.0), ("round-1", 4.0), ("round-2", 7.0))
]  # fmt: skip


@pytest.mark.parametrize("frontier", [{}, make_frontier()], ids=["alone", "on the frontier"])
def test_rounds_are_a_curve_of_their_own_from_the_first_model(frontier: dict[str, Any]):
    both = add_rounds_to_frontier(frontier, {"reward": "gold", "rounds": ROUNDS})
    axes = figures.draw_frontier(both).axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert [[0.0, 1.0], [4.0, 2.0], [7.0, 2.75]] in drawn, "the rounds are not joined from SFT on"
    assert {"SFT", "round-1", "round-2", "on-policy rounds"} <= {text.get_text() for text in axes.texts}
    assert add_rounds_to_frontier(frontier, {"reward": "another", "rounds": ROUNDS}) == frontier or not frontier, (
        "rounds measured by another reward stand on the frontier's axes"
    )
    assert add_rounds_to_frontier(frontier, {"reward": "", "rounds": ROUNDS}) == frontier, (
        "rounds without a reward are drawn"
    )


def test_each_reward_over_rounds_has_a_panel():
    panels = figures.draw_rewards_over_rounds(ROUNDS).axes
    drawn = {axes.get_title(): axes.lines[0].get_xydata().tolist() for axes in panels}
    assert drawn == {"gold": [[0, 0], [4, 4], [7, 7]], "proxy": [[0, 0], [4, 8], [7, 14]]}, "not the rewards over KL"


def test_rounds_alone_stand_in_the_report(tmp_path: Path):
    (tmp_path / "rounds.json").write_text(json.dumps({"reward": "gold", "rounds": ROUNDS}))
    text = write_report(tmp_path).read_text()
    assert "on-policy rounds" in text and "0 runs" not in text, (
        "the page lacks the rounds, or counts runs of no frontier"
    )


def test_win_rates_over_temperature():
    axes = figures.draw_win_rates(make_winrate((0.25, 1.0))["comparisons"]).axes[0]
    assert axes.get_xlabel() == "sampling temperature", "several temperatures are not drawn over temperature"
    drawn = make_winrate()["comparisons"]
    drawn[0]["length_controlled_win_rate"] = None
    assert len(figures.draw_win_rates(drawn).axes[0].get_yticks()) == 3, "a rate that could not be had is drawn"


def test_script(folder: Path, capsys: pytest.CaptureFixture[str]):
    importlib.import_module("report").main([str(folder)])
    assert str(folder / "report.html") in capsys.readouterr().out, "the script does not say where the report is"
