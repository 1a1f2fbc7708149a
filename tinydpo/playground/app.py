"""The playground's page: ask both models, see where the policy left its reference, vote, compare a pair of your own.

Gradio serves it with its own files alone: no fonts, scripts or figures come from, or go to, another host.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import EvaluateArguments
from tinydpo.playground.side_by_side import Answer, SideBySide, count_votes, save_vote
from tinydpo.report.tokens import color_tokens, render_template, split_into_pieces

FRAMES_A_SECOND = 10  # more of the page's redrawing than eyes follow would only slow the models down
WRITING = "Writing …"
LEGEND = (
    "Blue: likelier under the policy than under its reference; orange: less likely. "
    "Hover over a token for its implicit reward, β log(π/π<sub>ref</sub>)."
)
CSS = Path(__file__).with_name("templates") / "page.css"


@dataclass
class PlaygroundArguments:
    """Where the page is served."""

    port: int = field(default=7860, metadata={"help": "Port of the page on 127.0.0.1."})

    def __post_init__(self):
        """Refuse what is no port (ValueError)."""
        if not 0 < self.port < 65536:
            raise ValueError(f"port must lie between 1 and 65535, got {self.port}")


def serve_app(app: gr.Blocks, port: int) -> None:
    """Serve the page on 127.0.0.1 alone, until Ctrl+C.

    Raises:
        UserError: the port is taken.
    """
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        app.launch(
            server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, footer_links=[], quiet=True,
            prevent_thread_lock=True, theme=theme, css_paths=CSS,
        )  # fmt: skip
    except OSError:
        raise UserError(f"port {port} is taken; pass another --port") from None
    print(f"The playground is at http://127.0.0.1:{port} (Ctrl+C ends it).", flush=True)
    app.block_thread()


def build_app(models: SideBySide, args: EvaluateArguments, votes: Path, notice: str = "") -> gr.Blocks:
    """The page.

    Args:
        models: who answers.
        args: where the sampling settings start, and the models' names.
        votes: the file that votes are appended to.
        notice: a word of warning about the data, shown on top.
    """

    def panel(name: str, answer: Answer, scale: float, told: bool = True) -> str:
        """One answer as HTML; untold, without anything that gives away which model wrote it."""
        parts = split_into_pieces(models.tokenizer, answer.ids)
        text = color_tokens(parts, answer.rewards, scale) if told else "".join(parts)
        return str(render_template("playground/templates/answer.html", name=name, text=text, answer=answer, told=told))

    def panels(names: tuple[str, str], answers: tuple[Answer, Answer], told: bool = True) -> list[str]:
        scale = max((abs(reward) for answer in answers for reward in answer.rewards), default=0.0)
        return [panel(name, answer, scale, told) for name, answer in zip(names, answers, strict=True)]

    def generate(
        text: str, blind: bool, tokens: int, temperature: float, top_k: int, top_p: float, seed: str
    ) -> Iterator[tuple]:
        wrong = "" if text.strip() else "Type a prompt first."
        if seed.strip() and not seed.strip().isdecimal():
            wrong = "A seed is a whole number; leave it empty for a new one each time."
        try:
            ids, cut = models.fit_prompt(prompt := models.prompt(text), int(tokens)) if not wrong else ([], False)
        except UserError as error:
            wrong = f"Nothing asked: {error}."
        if wrong:
            yield "", "", wrong, None, closed, closed
            return
        seed = int(seed.strip() or random.randrange(2**31)) % 2**63
        swapped = blind and random.random() < 0.5
        names, drawn = ("Left", "Right") if blind else ("SFT", "DPO"), 0.0
        sampling = {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p), "seed": seed}
        for answers in models.stream(ids, int(tokens), **sampling):
            shown = answers[::-1] if swapped else answers
            if time.monotonic() - drawn > 1 / FRAMES_A_SECOND:
                drawn = time.monotonic()
                yield *panels(names, shown, not blind), WRITING, None, closed, closed
        done = f"Which answer is better? Seed {seed}.{' The prompt was too long: its start was cut.' * cut}"
        state = {"prompt": prompt, "answers": shown, "names": ("DPO", "SFT") if swapped else ("SFT", "DPO")}
        yield *panels(names, shown, not blind), done, state, open_, open_

    def vote(state: dict[str, Any] | None, better: int) -> Any:
        if state is None:  # a second click, before the first one's answer
            return gr.skip()
        shown = panels(state["names"], state["answers"])
        texts = [models.text(answer) for answer in state["answers"]]
        try:
            count = save_vote(votes, state["prompt"], texts[better], texts[1 - better])
        except UserError as error:
            return *shown, f"No vote: {error}.", None, closed, closed, gr.skip()
        thanks = f"You preferred **{state['names'][better]}**."
        if not all(answer.ended for answer in state["answers"]):
            thanks += " An answer had not ended: training will take its last word for its end."
        return *shown, thanks, None, closed, closed, tally(count)

    def tally(count: int) -> str:
        if count < 2:
            return f"{count or 'No'} vote{'' if count == 1 else 's'} so far; from two on you can train on them."
        recipe = Path("recipes") / votes.parent.name
        where = f"RECIPE={recipe} " if (recipe / "dpo.yaml").is_file() else ""
        flags = f"--dataset_name {votes} --model_name_or_path {args.ref_model_name_or_path}"
        command = f'make dpo {where}ARGS="{flags} --output_dir {votes.parent}/dpo-votes"'
        return f"{count} votes in `{votes}`. To train on them:\n```\n{command}\n```"

    def compare(prompt: str, first: str, second: str) -> tuple[str, str, str]:
        try:
            *answers, cut = models.compare(prompt, first, second)
        except UserError as error:
            return "", "", f"Nothing compared: {error}."
        margin = answers[0].reward - answers[1].reward
        if round(margin, 2) == 0:
            said = "The policy's implicit reward tells no difference between them."
        else:
            said = (
                f"The policy prefers **answer {'A' if margin > 0 else 'B'}**: its implicit reward is higher by "
                f"{abs(margin):.2f}, which is a preference of {1 / (1 + math.exp(-abs(margin))):.0%} under the "
                "Bradley-Terry model of the DPO paper."
            )
        cut_to = f" Cut to {models.max_length} tokens, as in training." if cut else ""
        return *panels(("Answer A", "Answer B"), tuple(answers)), said + cut_to

    open_, closed = gr.update(interactive=True), gr.update(interactive=False)
    with gr.Blocks(title="tinydpo playground", analytics_enabled=False) as app:
        gr.Markdown(
            f"# tinydpo playground\nPolicy (DPO) `{args.model_name_or_path}`, reference (SFT) "
            f"`{args.ref_model_name_or_path}`, β = {models.beta:g}.{' ' * bool(notice)}{notice}"
        )
        with gr.Tab("Ask both"):
            prompt = gr.Textbox("", label="Prompt", placeholder="A question, or a dialogue in HH's form", lines=2)
            with gr.Accordion("Sampling", open=False), gr.Row():
                room = models.max_length // 2
                settings = [
                    gr.Slider(1, room, room, step=1, label="Most tokens"),
                    gr.Slider(0.05, max(2.0, args.temperature), args.temperature, step=0.05, label="Temperature"),
                    gr.Slider(0, max(200, args.top_k), args.top_k, step=1, label="Top k (0: all)"),
                    gr.Slider(0.05, 1, args.top_p, step=0.05, label="Top p (1: all)"),
                    gr.Textbox("", label="Seed (empty: a new one)", max_lines=1),
                ]
            with gr.Row(equal_height=True):
                ask = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
                blind = gr.Checkbox(label="Blind: hide which model is which until the vote")
            with gr.Row(equal_height=True):
                sides = [gr.HTML(elem_classes="answer", container=True, padding=True) for _ in range(2)]
            with gr.Row():
                buttons = [gr.Button(f"{side} is better", interactive=False) for side in ("Left", "Right")]
            said, state = gr.Markdown(), gr.State()
            counted = gr.Markdown()
            gr.Markdown(LEGEND)
        with gr.Tab("Your own pair"):
            pair = [gr.Textbox("", label="Prompt", lines=2)]
            with gr.Row():
                pair += [gr.Textbox("", label=f"Answer {name}", lines=4) for name in "AB"]
            score = gr.Button("Compare", variant="primary")
            verdict = gr.Markdown()
            with gr.Row(equal_height=True):
                scored = [gr.HTML(elem_classes="answer", container=True, padding=True) for _ in range(2)]
            gr.Markdown(LEGEND)

        # One answer at a time, whoever asks: the models share the machine. Votes take turns too.
        models_turn = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        votes_turn = {"concurrency_id": "votes", "concurrency_limit": 1, "api_visibility": "private"}
        shown = [*sides, said, state, *buttons]
        asked = ask.click(generate, [prompt, blind, *settings], shown, show_progress="hidden", **models_turn)
        stopped = stop.click(None, cancels=[asked], api_visibility="private")
        # In a second step: beside the cancelling, the answer's last frame may come after it and write over it.
        stopped.then(lambda now: "Stopped." if now == WRITING else now, said, said, **votes_turn)
        for better, button in enumerate(buttons):
            button.click(partial(vote, better=better), state, [*shown, counted], **votes_turn)
        score.click(compare, pair, [*scored, verdict], **models_turn)
        app.load(lambda: tally(count_votes(votes)), None, counted, api_visibility="private")
    return app
