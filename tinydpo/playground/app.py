"""The playground's page: ask both models, see where the policy departs from its reference, vote, compare a pair.

It loads nothing from other hosts and sends nothing to them.
"""

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from tinydpo.errors import UserError
from tinydpo.evaluation.arguments import EvaluateArguments
from tinydpo.playground.side_by_side import Answer, SideBySide, save_vote
from tinydpo.report.tokens import color_tokens, render_template, split_into_pieces

FRAMES_PER_SECOND = 10  # drawing the page more often would only slow the models down
WRITING = "Writing …"
LEGEND = (
    "Blue: likelier under the policy than under its reference; orange: less likely. "
    "Hover over a token for its implicit reward, β log(π/π<sub>ref</sub>)."
)
CSS = Path(__file__).with_name("templates") / "page.css"
# One event at a time for all visitors: the models share the machine, and votes share a file.
ASK_MODELS = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
USE_VOTES = {"concurrency_id": "votes", "concurrency_limit": 1, "api_visibility": "private"}
VOTES = {"First is better": 0, "About the same": None, "Second is better": 1}  # a button's words: the better answer
ENABLED = [gr.update(interactive=True)] * len(VOTES)
DISABLED = [gr.update(interactive=False)] * len(VOTES)


def serve_app(app: gr.Blocks, port: int) -> None:
    """Serve the page on 127.0.0.1, to browsers that ask for that address, until Ctrl-C (UserError: a taken port)."""
    os.environ["no_proxy"] = "*"  # gradio looks at the page before it goes on, and nothing here asks another host
    local_only = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])  # no DNS rebinding
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to download
    try:
        app.launch(
            server_name="127.0.0.1", server_port=port, share=False, ssr_mode=False, footer_links=[], quiet=True,
            prevent_thread_lock=True, css_paths=CSS, theme=gr.themes.Default(primary_hue="blue", **fonts),
            max_file_size=0, app_kwargs={"middleware": [local_only]},
        )  # fmt: skip
    except (OSError, OverflowError):
        raise UserError(f"port {port} is taken or not a port; pass a different --port") from None
    remote = f"from another machine first ssh -L {port}:127.0.0.1:{port} HOST"
    print(f"The playground is at http://127.0.0.1:{port} ({remote}; Ctrl-C ends it).", flush=True)
    app.block_thread()


@dataclass
class Handlers:
    """What happens on the page: asks `models`, and returns what its components show."""

    models: SideBySide
    ref_name: str  # the model to train on the votes
    votes: Path

    def generate(
        self, text: str, blind: bool, tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None
    ) -> Iterator[tuple]:
        """Stream both answers: first, second, the line below, the state for a vote, and the vote buttons."""
        try:
            if not text.strip():
                raise UserError("type a prompt first")
            prompt = self.models.make_prompt(text)
            ids, is_cut = self.models.fit_prompt(prompt, tokens)
        except UserError as error:
            yield "", "", f"Nothing generated: {error}.", None, *DISABLED
            return
        seed = seed or random.randrange(1, 2**31)
        names = ("Reference", "Policy")
        is_swapped = blind and random.random() < 0.5
        drawn_at = 0.0
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        for answers in self.models.stream_answers(ids, tokens, **sampling):
            shown = answers[::-1] if is_swapped else answers
            if time.monotonic() - drawn_at > 1 / FRAMES_PER_SECOND:
                drawn_at = time.monotonic()
                yield *self._show(names, shown, blind), WRITING, None, *DISABLED
        message = f"Which answer is better? Seed {seed}."
        if is_cut:
            message += " The prompt was too long: its start was cut."
        state = {"prompt": prompt, "answers": shown, "names": names[::-1] if is_swapped else names}
        yield *self._show(names, shown, blind), message, state, *ENABLED

    def vote(self, state: dict[str, Any] | None, better: int | None) -> Any:
        """Save a vote for the first (0) or second (1) answer, none for None, and show which model wrote which."""
        if state is None:  # a second click before the first one was handled
            return gr.skip()
        answers = state["answers"]
        shown = self._show(state["names"], answers)
        if better is None:
            return *shown, "About the same: no pair is saved.", None, *DISABLED, gr.skip()
        texts = [self.models.decode_answer(answer) for answer in answers]
        try:
            save_vote(self.votes, state["prompt"], texts[better], texts[1 - better])
        except UserError as error:
            return *shown, f"No vote: {error}.", None, *DISABLED, gr.skip()
        message = f"You preferred **{state['names'][better]}**."
        if not all(answer.ended for answer in answers):
            message += " An answer was cut off; training will treat its last word as its end."
        return *shown, message, None, *DISABLED, self.describe_votes()

    def describe_votes(self) -> str:
        """How many votes there are, and the command that trains on them."""
        count = len(self.votes.read_text(encoding="utf-8").splitlines()) if self.votes.is_file() else 0
        if count < 2:
            return f"Votes so far: {count}. You can train on two or more."
        recipe = Path("recipes") / self.votes.parent.name
        recipe_flag = f"RECIPE={recipe} " if (recipe / "dpo.yaml").is_file() else ""
        flags = f"--dataset_name {self.votes} --model_name_or_path {self.ref_name}"
        command = f'make dpo {recipe_flag}ARGS="{flags} --output_dir {self.votes.parent}/dpo-votes"'
        return f"{count} votes in `{self.votes}`. To train on them:\n```\n{command}\n```"

    def compare(self, prompt: str, first: str, second: str) -> tuple[str, str, str]:
        """Show a typed pair with its rewards, and say which answer the policy prefers."""
        try:
            *answers, is_cut = self.models.compare_pair(prompt, first, second)
        except UserError as error:
            return "", "", f"Nothing compared: {error}."
        margin = answers[0].reward - answers[1].reward
        message = (
            f"The policy prefers **answer {'A' if margin > 0 else 'B'}**: its implicit reward is higher by "
            f"{abs(margin):.2f}, which is a preference of {1 / (1 + math.exp(-abs(margin))):.0%} under the "
            "Bradley-Terry model of the DPO paper."
        )
        if round(margin, 2) == 0:
            message = "The policy's implicit reward is the same for both."
        if is_cut:
            message += f" Cut to {self.models.max_length} tokens, as in training."
        return *self._show(("Answer A", "Answer B"), answers), message

    def _show(self, names: tuple[str, str], answers: Sequence[Answer], blind: bool = False) -> list[str]:
        """Two answers as HTML; if `blind`, without what gives away which model wrote which."""
        scale = max((abs(reward) for answer in answers for reward in answer.rewards), default=0.0)
        shown = []
        for name, side, answer in zip(names, ("First", "Second"), answers, strict=True):
            pieces = split_into_pieces(self.models.tokenizer, answer.ids)
            text = "".join(pieces) if blind else color_tokens(pieces, answer.rewards, scale)
            values = {"name": side if blind else name, "text": text, "answer": answer, "blind": blind}
            shown.append(str(render_template("playground/templates/answer.html", **values)))
        return shown


def build_app(
    models: SideBySide, args: EvaluateArguments, votes: Path, notice: str = "", examples: Sequence[str] = ()
) -> gr.Blocks:
    """The page; `args` gives the models' names and where the sampling settings start, `examples` prompts to click."""
    handlers = Handlers(models, args.ref_model_name_or_path, votes)
    with gr.Blocks(title="tinydpo playground") as app:
        gr.Markdown(
            f"# tinydpo playground\nPolicy `{args.model_name_or_path}`, reference "
            f"`{args.ref_model_name_or_path}`, β = {models.beta:g}. {notice}"
        )
        with gr.Tab("Ask both"):
            build_ask_tab(app, handlers, args, examples)
        with gr.Tab("Your own pair"):
            build_compare_tab(handlers)
    return app


def build_ask_tab(app: gr.Blocks, handlers: Handlers, args: EvaluateArguments, examples: Sequence[str]) -> None:
    """A prompt, its two answers, and votes."""
    prompt = gr.Textbox("", label="Prompt", placeholder="A question, or a dialogue in HH's form", lines=2)
    if examples:
        gr.Examples([[text] for text in examples], prompt, label="Held-out prompts", api_visibility="private")
    with gr.Accordion("Sampling", open=False), gr.Row():
        room = handlers.models.max_length // 2
        settings = [
            gr.Slider(1, room, room, step=1, label="Most tokens"),
            gr.Slider(
                0,
                max(2.0, args.temperature),
                args.temperature,
                step=0.05,
                label="Temperature (0: the likeliest token)",
            ),
            gr.Slider(0, max(200, args.top_k), args.top_k, step=1, label="Top k (0: all)"),
            gr.Slider(0.05, 1, args.top_p, step=0.05, label="Top p (1: all)"),
            gr.Number(0, label="Seed (0: a new one)", precision=0),  # Gradio shows 0 for no value and sends it
        ]
    with gr.Row(equal_height=True):
        ask = gr.Button("Generate", variant="primary")
        stop = gr.Button("Stop")
        blind = gr.Checkbox(label="Blind: hide which model is which until the vote")
    sides = build_answer_row()
    with gr.Row():
        buttons = [gr.Button(words, interactive=False) for words in VOTES]
    message = gr.Markdown()
    state = gr.State()
    vote_count = gr.Markdown()
    gr.Markdown(LEGEND)

    shown = [*sides, message, state, *buttons]
    asked = ask.click(handlers.generate, [prompt, blind, *settings], shown, show_progress="hidden", **ASK_MODELS)
    stopped = stop.click(None, cancels=[asked], api_visibility="private")
    # In a second step: in the step that cancels, the answer's last frame could overwrite it.
    stopped.then(lambda now: "Stopped." if now == WRITING else now, message, message, **USE_VOTES)
    for button, better in zip(buttons, VOTES.values(), strict=True):
        button.click(partial(handlers.vote, better=better), state, [*shown, vote_count], **USE_VOTES)
    app.load(handlers.describe_votes, None, vote_count, api_visibility="private")


def build_compare_tab(handlers: Handlers) -> None:
    """A prompt and two answers to type, and their rewards."""
    prompt = gr.Textbox("", label="Prompt", lines=2)
    with gr.Row():
        answers = [gr.Textbox("", label=f"Answer {name}", lines=4, min_width=320) for name in ("A", "B")]
    compare = gr.Button("Compare", variant="primary")
    verdict = gr.Markdown()
    sides = build_answer_row()
    gr.Markdown(LEGEND)
    compare.click(handlers.compare, [prompt, *answers], [*sides, verdict], **ASK_MODELS)


def build_answer_row() -> list[gr.HTML]:
    """Two answers side by side, on a phone below each other."""
    with gr.Row(equal_height=True):
        return [gr.HTML(elem_classes="answer", container=True, padding=True) for _ in range(2)]
