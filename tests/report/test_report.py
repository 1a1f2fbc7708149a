"""The report: one page that shows what is there, is safe with any text, and claims no more than the figures do."""

import importlib
import json
import math
import random
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from tinydpo.data.notice import CONTENT_NOTICE
from tinydpo.errors import UserError
from tinydpo.evaluation.on_policy import add_rounds_to_frontier
from tinydpo.evaluation.table import headline_rows
from tinydpo.evaluation.winrate import format_caveats
from tinydpo.report import figures
from tinydpo.report.page import write_report

RESULTS = {
    "pairs": 40, "reward_accuracy": 0.55, "reward_accuracy_ci95": [0.398, 0.693], "reward_margin": 0.3,
    "reward_margin_se": 0.05, "dpo_loss": 0.66, "beta": 0.1, "nll_chosen_policy": 2.5, "nll_chosen_ref": 2.4,
    "raw_likelihood_accuracy_policy": 0.5, "raw_likelihood_accuracy_ref": 0.5, "kl_per_sequence": 3.0,
    "kl_per_sequence_se": 0.2, "kl_per_token": 0.1, "mean_length_policy": 30.0, "mean_length_ref": 28.0,
    "ended_policy": 0.9, "ended_ref": 0.8, "reward_policy": 2.0, "reward_ref": 1.0, "win_rate_vs_ref": 0.7,
    "win_rate_ci95": [0.6, 0.8],
    "subsets": {
        name: {"pairs": 20, "reward_accuracy": 0.55, "reward_accuracy_ci95": [0.3, 0.8]}
        for name in ("harmless $x$", "helpful <b>")
    },
    "settings": {
        "model_name_or_path": "/home/someone/secret/dpo", "ref_model_name_or_path": "me/sft", "max_length": 128,
        "num_prompts": 30, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "reward_funcs": ["gold"], "seed": 7,
        "dtype": "float32", "dataset_name": "my/pairs", "dataset_revision": "abc123",
    },
}  # fmt: skip
SECTIONS = {
    "evaluation/eval_results.json": 'id="more-figures"',
    "evaluation/pairs.jsonl": "Reward margins.",
    "evaluation/samples.jsonl": 'id="answers"',
    "frontier/frontier.json": 'id="frontier"',
    "winrate/winrate.json": 'id="win-rates"',
    "dpo/trainer_state.json": 'id="training"',
}
ROUNDS = [
    {"name": name, "kl": kl, "kl_se": 0.1, "reward": 1 + kl / 4, "reward_se": 0.1,
     "rewards": {"gold": {"mean": kl, "se": 0.1}, "proxy": {"mean": 2 * kl, "se": 0.2}}}
    for name, kl in (("SFT", 0.0), ("round-1", 4.0), ("round-2", 7.0))
]  # fmt: skip


def make_sample(text: str = "Yes.", tokens: int = 3) -> dict[str, Any]:
    answers = {"prompt": text, "policy": text, "ref": text, "chosen": text, "ended_policy": True, "ended_ref": False}
    return answers | {"pieces": [text[:60]] * tokens, "token_rewards": [0.1 * (-1) ** i for i in range(tokens)]}


def make_frontier() -> dict[str, Any]:
    points = [
        {"curve": curve, "loss": "sigmoid", "beta": beta, "seed": seed, "step": step, "kl": step / 50 / beta + seed,
         "kl_se": 0.1, "reward": step / 100 + seed, "reward_se": 0.1}
        for curve in figures.METHODS for beta in (0.1, 1.0) for seed in (0, 1) for step in (100, 50)
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
    return {
        "settings": {"model_name_or_path": RESULTS["settings"]["model_name_or_path"]},
        "judge": "a judge",
        "comparisons": comparisons,
    }


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with every part."""
    folder = tmp_path / "my-run"
    rng = random.Random(0)
    log = [{"step": step, "loss": 0.7 - step / 100, "rewards/accuracies": 0.5} for step in range(10)]
    write(folder / "evaluation/eval_results.json", RESULTS)
    write(folder / "evaluation/pairs.jsonl", *[{"margin": rng.gauss(0.3, 1)} for _ in range(40)])
    write(folder / "evaluation/samples.jsonl", *[make_sample(f"answer {i}") for i in range(30)])
    write(folder / "frontier/frontier.json", make_frontier())
    write(folder / "winrate/winrate.json", make_winrate())
    write(folder / "dpo/trainer_state.json", {"log_history": log})
    environment = {"git_commit": "c0ffee", "packages": {"torch": "2.13.0"}, "date": "2026-11-27", "device": "EPYC"}
    write(folder / "dpo/environment.json", environment)
    write(folder / "dpo/train_results.json", {"train_runtime": 318.0})
    write(
        folder / "dpo/run_config.yaml", {"dataset_name": "my/pairs", "seed": 11, "beta": 0.1, "loss_type": ["sigmoid"]}
    )
    return folder


def test_whole_page_loads_nothing_and_shows_every_part(folder: Path, capsys: pytest.CaptureFixture[str]):
    importlib.import_module("report").main([str(folder)])
    assert str(folder / "report.html") in capsys.readouterr().out
    raw = (folder / "report.html").read_text()
    tags = re.findall(r"<(\w+)", raw)
    assert all(section in raw for section in SECTIONS.values())
    loaded = re.findall(r'\b(?:src|srcset|data)="(.*?)"', raw)
    assert len(loaded) == 6 and all(uri.startswith("data:image/svg+xml;base64,") for uri in loaded)
    assert not {"script", "link", "iframe"} & set(tags)
    assert "@import" not in raw and "url(" not in raw, "the style loads something"
    for fact in (">11<", "c0ffee", "torch 2.13.0", "abc123", "my/pairs", "ipo-beta5-seed0"):
        assert fact in raw, f"{fact!r} is missing: seeds, versions, data and failures must be on the page"
    assert "DPO trained on 2026-11-27 in 5.3 minutes on EPYC" in raw, "when, how long and on what is missing"
    assert "β log π/π<sub>ref</sub>" in raw and "π_ref" not in raw, "a formula is shown as it is typed"
    assert "secret" not in raw, "a local path is on a page that may be shared"
    assert tags.count("article") == 20 and "20 of 30" in raw
    assert write_report(folder).read_text() == raw, "the same files give another page"

    head, table = raw.split('id="more-figures"')
    assert head.count("<li>") == 6, "the head shows four to six figures"
    assert "win rate over chosen" in head
    table = table.partition("</table>")[0]
    for row in headline_rows(RESULTS):
        label = escape(row.label)
        assert (f"<li>{label}\n" in head) != (f"<td>{label} " in table), f"{label} is not shown once"


@pytest.mark.parametrize("only", SECTIONS)
def test_one_part_is_enough(folder: Path, only: str):
    for name in SECTIONS:
        if name != only:
            (folder / name).unlink()
    raw = write_report(folder).read_text()
    assert [name for name, section in SECTIONS.items() if section in raw] == [only]


@pytest.mark.parametrize("name", SECTIONS)
def test_damaged_file_is_named_and_the_old_page_stays(folder: Path, name: str):
    before = write_report(folder).read_text()
    for content in ((folder / name).read_text()[:-9], "[1]\n"):
        (folder / name).write_text(content)
        with pytest.raises(UserError, match=f"{Path(name).name}.* is damaged"):
            write_report(folder)
    assert (folder / "report.html").read_text() == before


def test_evaluation_of_another_name_is_found(folder: Path):
    (folder / "evaluation").rename(folder / "out")
    assert "of 40 held-out pairs" in write_report(folder).read_text()


def test_an_evaluation_of_the_sft_model_does_not_pass_for_dpos(folder: Path):
    write(folder / "sft/run_config.yaml", {"seed": 12})
    for name, policy, pairs in (("by-me", "dpo", 42), ("evaluation", "sft", 43), ("evaluation-sft", "sft", 44)):
        settings = RESULTS["settings"] | {"model_name_or_path": str(folder / policy)}
        write(folder / name / "eval_results.json", RESULTS | {"pairs": pairs, "settings": settings})
    raw = write_report(folder).read_text()
    assert "of 42 held-out pairs" in raw, "the page shows SFT against its base, because of the folder's name or date"


def test_report_shows_the_evaluation_that_was_just_made(folder: Path):
    write(folder / "evaluation-512/eval_results.json", RESULTS | {"pairs": 41})
    assert "of 41 held-out pairs" in write_report(folder, folder / "evaluation-512").read_text()
    assert "of 40 held-out pairs" in write_report(folder).read_text()


def test_a_judges_win_rate_is_of_the_policy_shown(folder: Path):
    other = {"model_name_or_path": "runs/my-run/beta03"}
    comparisons = [one | {"win_rate": 0.31} for one in make_winrate()["comparisons"]]
    write(folder / "winrate-beta03/winrate.json", make_winrate() | {"settings": other, "comparisons": comparisons})
    page = write_report(folder).read_text()
    assert "0.580" in page and "0.310" not in page, "the win rate is another policy's"
    evaluation = RESULTS | {"settings": RESULTS["settings"] | other, "pairs": 41}
    write(folder / "evaluation-beta03/eval_results.json", evaluation)
    for chosen in ({"evaluation": folder / "evaluation-beta03"}, {"policy": "runs/my-run/beta03"}):
        text = write_report(folder, **chosen).read_text()
        assert "of 41 held-out pairs" in text and "0.310" in text and "0.580" not in text


def test_runs_are_titled_by_what_they_trained(folder: Path):
    settings = RESULTS["settings"] | {"model_name_or_path": str(folder / "sft"), "ref_model_name_or_path": "base"}
    write(folder / "evaluation/eval_results.json", RESULTS | {"settings": settings})
    write(folder / "sft/run_config.yaml", {"seed": 12})
    raw = write_report(folder).read_text()
    assert "<h3>SFT</h3>" in raw and "<h3>DPO</h3>" not in raw, "an SFT run is called DPO"


def test_interval_below_chance_has_a_warning(folder: Path):
    worse = RESULTS | {"win_rate_vs_ref": 0.3, "win_rate_ci95": [0.2, 0.4]}
    write(folder / "evaluation/eval_results.json", worse)
    assert "<strong>Below 0.5.</strong>" in write_report(folder).read_text()


def test_nothing_to_report_is_one_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="make evaluate"):
        write_report(tmp_path)


def test_any_text_is_only_text(tmp_path: Path):
    pages = []
    for text in ("tame", "<script>x</script></style></div><img src=x onerror=y>", '" onmouseover="', "\0 ‮ \ud800 $x$"):
        results = RESULTS | {"subsets": {text: RESULTS["subsets"]["helpful <b>"]}}
        write(tmp_path / "evaluation/eval_results.json", results)
        write(tmp_path / "evaluation/samples.jsonl", make_sample(text))
        pages.append(re.findall(r"<(\w+)", write_report(tmp_path).read_text(encoding="utf-8")))
    assert pages == [pages[0]] * 4, "an answer or a name became part of the page"


def test_notices_of_hh_and_the_toy_task_are_only_on_their_pages(tmp_path: Path):
    for name, reward in (("my/pairs", "gold"), ("/data/hh-rlhf", "gold"), ("data", "tinydpo.toy_task.gold_reward")):
        results = RESULTS | {"settings": RESULTS["settings"] | {"dataset_name": name, "reward_funcs": [reward]}}
        write(tmp_path / "evaluation/eval_results.json", results)
        raw = write_report(tmp_path).read_text()
        assert (CONTENT_NOTICE in raw) == ("hh-rlhf" in name)
        assert ("labels are noisy by design" in raw) == ("toy_task" in reward)


def test_doubts_stand_beside_win_rates(tmp_path: Path):
    judge = {"pairs": 64, "invalid": 0, "agreement": 0.5, "agreement_ci95": [0.4, 0.6], "order_flip_rate": 0.75}
    winrate = make_winrate() | {"calibration": judge}
    winrate["comparisons"][0]["invalid"] = 14
    write(tmp_path / "winrate/winrate.json", winrate)
    text = unescape(write_report(tmp_path).read_text())
    many_invalid, chance = (format_caveats(winrate, comparison) for comparison in winrate["comparisons"])
    assert "28% of the pairs are invalid" in many_invalid
    assert text.count(many_invalid) == 2, "in the head and in the table"
    assert text.count(chance) == 3, "in the head and at each win rate of the table"
    assert "75% of its verdicts change with the order, 0 pairs are invalid" in text


def test_histogram_counts_every_pair():
    margins = [*np.random.default_rng(0).normal(size=200), 0.0, 1e9, -1e9, float("nan")]
    bars = figures.draw_margin_histogram(margins).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == len(margins)
    assert sum(bar.get_height() for bar in bars if bar.get_x() >= 0) == sum(margin > 0 for margin in margins)


def get_lines(axes: figures.Axes) -> list[list[list[float]]]:
    return [line.get_xydata().tolist() for line in axes.lines]


def test_frontier_joins_last_checkpoints_in_the_mean_over_seeds():
    axes = figures.draw_frontier(make_frontier()).axes[0]
    assert [[0.0, 0.0], [2.5, 1.5], [20.5, 1.5]] in get_lines(axes)


@pytest.mark.parametrize("frontier", [{}, make_frontier()], ids=["alone", "on the frontier"])
def test_rounds_are_a_curve_of_their_own(frontier: dict[str, Any], tmp_path: Path):
    axes = figures.draw_frontier(add_rounds_to_frontier(frontier, {"reward": "gold", "rounds": ROUNDS})).axes[0]
    assert [[0.0, 1.0], [4.0, 2.0], [7.0, 2.75]] in get_lines(axes)
    write(tmp_path / "rounds.json", {"reward": "gold", "rounds": ROUNDS})
    raw = write_report(tmp_path).read_text()
    assert 'id="frontier"' in raw and "0 runs" not in raw, "the rounds are missing, or runs of no frontier are counted"


def test_each_reward_over_rounds_has_a_panel():
    panels = figures.draw_rewards_over_rounds(ROUNDS).axes
    drawn = {axes.get_title(): get_lines(axes)[0] for axes in panels}
    assert drawn == {"gold": [[0, 0], [4, 4], [7, 7]], "proxy": [[0, 0], [4, 8], [7, 14]]}


def test_win_rates_over_temperature():
    axes = figures.draw_win_rates(make_winrate((0.25, 1.0))["comparisons"]).axes[0]
    assert get_lines(axes)[0] == [[0.25, 0.58], [1.0, 0.58]] and len(axes.containers) == 4
