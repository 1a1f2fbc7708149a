"""The playground: rewards that agree with scoring, votes that become training data, and the page in a real browser."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import ROOT
from toys import CHATML, say, with_turns
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import load_pairs
from tinydpo.errors import UserError
from tinydpo.models.loading import load_model
from tinydpo.playground.side_by_side import SideBySide, save_vote, typed_to_dialogue
from tinydpo.training.logps import token_logps

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """`policy/` and `ref/`: two random models of 2,048 positions that hardly ever end an answer."""
    folder = tmp_path_factory.mktemp("playground")
    end = tiny_tokenizer.eos_token_id
    for seed, role in enumerate(("policy", "ref")):
        torch.manual_seed(seed)
        size = {"vocab_size": len(tiny_tokenizer), "n_positions": 2048, "n_embd": 64, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=end, eos_token_id=end))
        weight = model.transformer.wte.weight.data[end]
        model.transformer.ln_f.bias.data -= 30 * weight / weight.dot(weight)
        model.save_pretrained(folder / role)
        tiny_tokenizer.save_pretrained(folder / role)
    return folder


@pytest.fixture(scope="module")
def models(folders: Path) -> SideBySide:
    policy, ref = (load_model(str(folders / role)) for role in ("policy", "ref"))
    return SideBySide(policy, ref, AutoTokenizer.from_pretrained(folders / "ref"), 0.3, 64, 32)


def score(models: SideBySide, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Implicit rewards of an answer's tokens, computed as evaluation does."""
    policy, ref = (token_logps(model, [prompt], [ids])[0] for model in (models.policy, models.ref))
    return models.beta * (policy - ref)


def test_streamed_rewards_are_those_of_scoring(models: SideBySide):
    prompt, _ = models.fit_prompt(typed_to_dialogue("How do I bake bread?"), 20)
    *_, answers = models.stream_answers(prompt, 20, **PLAIN)
    for answer in answers:
        assert answer.rewards == pytest.approx(score(models, prompt, answer.ids).tolist(), abs=1e-4)
    assert answers[0].ids != answers[1].ids, "both sides show one model's answer"


def test_each_side_is_what_its_model_writes_alone(models: SideBySide):
    greedy = PLAIN | {"temperature": 0}
    prompt, _ = models.fit_prompt(typed_to_dialogue("Hello?"), 12)
    *_, (ref, policy) = models.stream_answers(prompt, 12, **greedy)
    for answer, model in ((ref, models.ref), (policy, models.policy)):
        ids: list[int] = []
        while len(ids) < 12:
            with torch.no_grad():
                ids.append(model(torch.tensor([prompt + ids])).logits[0, -1].argmax().item())
        assert answer.ids == ids, "sides are swapped, or one influences the other"
    tokenizer = AutoTokenizer.from_pretrained(models.tokenizer.name_or_path)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(policy.ids[2])
    *_, (_, stopped) = replace(models, tokenizer=tokenizer).stream_answers(prompt, 12, **greedy)
    assert stopped.ended and stopped.ids == policy.ids[: policy.ids.index(policy.ids[2]) + 1]


def test_settings_have_effect_and_checkpoint_defaults_have_none(models: SideBySide):
    prompt, _ = models.fit_prompt(typed_to_dialogue("Hello?"), 12)

    def sample(**changed: Any) -> list[list[int]]:
        *_, answers = models.stream_answers(prompt, 12, **PLAIN | changed)
        return [list(answer.ids) for answer in answers]

    plain = sample()
    for changed in ({"temperature": 0.05}, {"top_k": 2}, {"top_p": 0.1}, {"seed": 1}):
        assert sample(**changed) != plain, f"{changed} has no effect"
    models.policy.generation_config.update(top_k=1, do_sample=True, repetition_penalty=9.0)
    assert sample() == plain, "the checkpoint's generation config reshapes the samples"


def test_what_is_too_long_is_cut_and_says_so(models: SideBySide):
    text = models.make_prompt("word " * 200 + "the question?")
    assert text.startswith("\n\nHuman: word") and text.endswith("the question?\n\nAssistant:")
    ids, is_cut = models.fit_prompt(text, 32)
    assert is_cut and len(ids) == 32 and text.endswith(models.tokenizer.decode(ids))
    assert not models.fit_prompt(typed_to_dialogue("Hi"), 32)[1]
    *answers, is_cut = models.compare_pair("question " * 100, "one " * 100, "two " * 100)
    assert is_cut and not any(answer.ended for answer in answers), "a pair is cut without a word"


def test_a_pair_is_scored_as_evaluation_does(models: SideBySide):
    first, second, is_cut = models.compare_pair("How are you?", "Fine, thanks.", "Go away <b>!</b>")
    assert not is_cut and first.ended and second.ended
    prompt = models.tokenizer(typed_to_dialogue("How are you?")).input_ids
    for answer, text in ((first, " Fine, thanks."), (second, " Go away <b>!</b>")):
        ids = [*models.tokenizer(text).input_ids, models.tokenizer.eos_token_id]
        assert answer.reward == pytest.approx(score(models, prompt, ids).sum(), abs=1e-4)


@pytest.mark.parametrize(("first", "message"), [(" \n", "type a prompt and two answers"), ("b", "identical")])
def test_pair_that_cannot_be_compared_is_one_sentence(first: str, message: str, models: SideBySide):
    with pytest.raises(UserError, match=message):
        models.compare_pair("p", first, "b")


def test_votes_are_training_data(tmp_path: Path, tiny_tokenizer: Any):
    rows = [(f'"{i}"\u2028 Human: {{"prompt"}}?', f" Yes\n{i}", "\n\nHuman: No é") for i in range(3)]
    path = tmp_path / "run" / "votes.jsonl"
    for row in rows:
        save_vote(path, *row)
    for chosen, rejected in (("same", "same"), ("", "b"), ("a", " ")):
        with pytest.raises(UserError, match="the same, or one is empty"):
            save_vote(path, "p", chosen, rejected)
    splits = load_pairs(DataArguments(dataset_name=str(path)), tiny_tokenizer, 4096)
    read = [(row["prompt"], row["chosen"], row["rejected"]) for split in splits.values() for row in split.texts]
    assert sorted(read) == rows, "--dataset_name reads other preferences than those voted for"


def test_with_a_chat_template_prompts_and_votes_are_messages(models: SideBySide, tmp_path: Path):
    tokenizer = with_turns(AutoTokenizer.from_pretrained(models.tokenizer.name_or_path), CHATML)
    chat = replace(models, tokenizer=tokenizer, chat=None)
    prompt = chat.make_prompt("Hi?")
    ids, _ = chat.fit_prompt(prompt, 8)
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    save_vote(tmp_path / "votes.jsonl", prompt, "Yes.", "No.")
    vote = json.loads((tmp_path / "votes.jsonl").read_text())
    assert vote["prompt"] == [say("user", "Hi?")] and vote["chosen"] == [say("assistant", "Yes.")]
    assert isinstance(replace(chat, chat=False).make_prompt("Hi?"), str), "the model was trained on HH's form"


def test_example_prompts_are_held_out_ones(task: Path, models: SideBySide):
    data = DataArguments(dataset_name=str(task / "data"), max_question_length=32)
    examples = models.choose_examples(data, seed=0)
    rows = [json.loads(line) for line in (task / "data/test.jsonl").read_text().splitlines()]
    held_out = {row["chosen"].rpartition("Assistant:")[0] + "Assistant:" for row in rows}
    assert len(examples) == 5 and not any("Human:" in text for text in examples), "questions are not as one types them"
    assert {models.make_prompt(text) for text in examples} <= held_out
    gone = DataArguments(dataset_name=str(task / "gone"))
    assert models.choose_examples(gone, seed=0) == [], "without its data a policy cannot be asked"


@pytest.fixture
def port() -> int:
    with socket.socket() as stream:
        stream.bind(("127.0.0.1", 0))
        return stream.getsockname()[1]


def test_a_taken_port_is_one_sentence(port: int):
    gradio = pytest.importorskip("gradio", reason="needs the extra 'playground'")
    from tinydpo.playground.app import serve_app

    taken = pytest.raises(UserError, match=f"port {port} is taken")
    with gradio.Blocks() as app, socket.create_server(("127.0.0.1", port)), taken:
        serve_app(app, port)


def test_only_this_machine_is_served_and_nothing_is_stored(port: int, monkeypatch: pytest.MonkeyPatch):
    gradio = pytest.importorskip("gradio", reason="needs the extra 'playground'")
    from tinydpo.playground.app import serve_app

    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    with gradio.Blocks() as app:
        gradio.Textbox()
    threading.Thread(target=serve_app, args=(app, port), daemon=True).start()

    def ask(path: str, host: str, body: bytes | None = None) -> int:
        headers = {"Host": host, "Content-Type": "multipart/form-data; boundary=b"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
        try:
            return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).status
        except urllib.error.HTTPError as error:
            return error.code

    for _ in range(200):
        with socket.socket() as stream:
            if getattr(app, "is_running", False) and not stream.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    upload = b'--b\r\nContent-Disposition: form-data; name="files"; filename="f"\r\n\r\nx\r\n--b--\r\n'
    try:
        assert ask("/", f"127.0.0.1:{port}") == ask("/", f"localhost:{port}") == 200, (
            "a proxy keeps the page from starting"
        )
        assert ask("/", "rebound.example") == 400, "another site's name for this machine reads models and votes"
        assert ask("/gradio_api/upload", "localhost", upload) == 413, "the page takes files that it never needs"
    finally:
        app.close()


@pytest.fixture
def page(folders: Path, tmp_path: Path, port: int) -> Iterator[Any]:
    """The page in a real browser, served by the real script; whatever goes wrong on either side fails the test."""
    pytest.importorskip("gradio", reason="needs the extra 'playground'")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or pytest.skip("needs chromium (Debian: apt-get install chromium)")
    command = [
        *(sys.executable, "scripts/playground.py", "--port", str(port), "--max_length", "2000"),
        *("--model_name_or_path", f"{folders}/policy", "--ref_model_name_or_path", f"{folders}/ref"),
        *("--output_dir", f"{tmp_path}/evaluation", "--dataset_name", "Anthropic/hh-rlhf"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    errors = []
    local = re.compile(rf"(http|ws)://127\.0\.0\.1:{port}/|data:|blob:")
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, f"the playground does not start: {line}"
        with sync_api.sync_playwright() as playwright:
            page = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            ).new_page()
            page.on("console", lambda message: message.type == "error" and errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: local.match(request.url) or errors.append(request.url))
            page.goto(f"http://127.0.0.1:{port}")
            yield page
    finally:
        server.terminate()
        printed, _ = server.communicate(timeout=30)
    assert printed == "", "the server logs errors"
    assert not errors, "errors in the browser's console, or requests to other hosts"


@pytest.mark.slow
def test_the_page_in_a_browser(page: Any, tmp_path: Path):
    tokens = page.locator(".token")
    question = "How do I <b>bake</b> bread at home?"

    def press(name: str) -> None:
        page.get_by_role("button", name=name, exact=True).click()

    def wait_for(text: str) -> None:
        page.get_by_text(re.compile(text)).first.wait_for(timeout=60_000)

    def unfold(part: Any, field: str) -> None:
        part.click()
        page.get_by_label(field).wait_for()
        # Gradio builds these fields when they are first shown and sets them once more within two frames, over what a
        # script has typed; a person sees them later.
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    wait_for("may be offensive or upsetting")
    wait_for("Votes so far: 0")
    press("Generate")
    wait_for("type a prompt first")

    page.get_by_label("Prompt").first.fill(question)
    unfold(page.get_by_text("Sampling"), "number input for Most tokens")
    page.get_by_label("number input for Most tokens").fill("12")
    press("Generate")
    wait_for(r"Seed [1-9]\d*\.")  # a new one, as none is typed
    page.get_by_label(re.compile("Seed")).fill("1")
    press("Generate")
    wait_for(r"Seed 1\.")
    assert tokens.count() == 24
    tokens.nth(5).hover()
    shown = tokens.nth(5).evaluate("token => getComputedStyle(token, '::after').content")
    assert math.isfinite(float(shown.strip('"'))), "hovering over a token does not show its implicit reward"
    boxes = [page.locator(".answer h3").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    page.set_viewport_size({"width": 390, "height": 800})
    boxes = [page.locator(".answer h3").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] < boxes[1]["y"], "on a phone the answers share its width"
    press("About the same")
    wait_for("no pair is saved")
    assert not (tmp_path / "votes.jsonl").exists(), "a tie becomes a preference pair"
    press("Generate")
    wait_for(r"Seed 1\.")
    press("First is better")
    wait_for("You preferred Reference")
    wait_for("Votes so far: 1")

    page.get_by_label(re.compile("Blind")).check()
    page.get_by_label(re.compile("Seed")).fill("2")
    press("Generate")
    wait_for(r"Seed 2\.")
    assert tokens.count() == 0, "colours give away a blind answer"
    press("Second is better")
    wait_for("You preferred (Reference|Policy)")
    assert tokens.count() == 24, "after a blind vote the rewards stay hidden"
    page.reload()
    wait_for("2 votes in")
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [typed_to_dialogue(question)] * 2

    page.get_by_label("Prompt").first.fill("Tell me a long story.")
    press("Generate")
    wait_for("Writing")
    press("Stop")
    wait_for("Stopped")
    written = page.locator(".token").count()
    time.sleep(1)
    assert page.locator(".token").count() == written, "Stop does not stop the answers"

    unfold(page.get_by_role("tab", name="Your own pair"), "Answer B")
    for label, typed in (("Prompt", "Hi?"), ("Answer A", "<img src=x onerror=alert(1)>"), ("Answer B", "Good day!")):
        page.get_by_label(label).last.fill(typed)
    press("Compare")
    wait_for("The policy prefers answer (A|B)")
    assert page.locator(".answer img").count() == 0, "an answer's text is taken for HTML"
