"""Models and data by their real ids and revisions, from a stand-in Hub on 127.0.0.1: there, missing, failing, cut."""

import argparse
import gzip
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub import Handler, HubError, Server
from running import ROOT

from tinydpo.errors import UserError
from tinydpo.models import hub as hub_clients
from tinydpo.models.loading import load_model, load_tokenizer

MODEL, MODEL_SHA = "openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
DATA, DATA_SHA = "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
SUBSETS = ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
RECIPE = ["--config", "recipes/gpt2-medium-hh/sft.yaml"]
SMALL = [
    *("--max_steps", "2", "--pairs_per_step", "4", "--max_length", "64", "--max_question_length", "32"),
    *("--eval_strategy", "no", "--dataloader_num_workers", "0", "--disable_tqdm", "true"),
]


class FailingHandler(Handler):
    """Fails in the requests that `server.fail` picks, in the way of `server.way`, and remembers all."""

    def route(self):
        self.server.seen.append(f"{self.command} {self.path}")
        if self.server.fail(len(self.server.seen), self.path):
            WAYS[self.server.way](self)
        super().route()

    def busy(self, status: int, **headers: str) -> None:
        raise HubError(status, "failing on purpose", None, headers)

    def cut(self) -> None:
        raise ConnectionError("closed before any byte")

    def hang(self) -> None:
        self.server.hung.append(self.path)
        self.server.released.wait(20)
        raise ConnectionError("closed at last")

    def page(self) -> None:
        body = b"<!DOCTYPE html><html>Please log in</html>"
        self.start(200, {"Content-Type": "text/html"}, len(body), "")
        if self.command != "HEAD":
            self.wfile.write(body)
        raise ConnectionError("a whole answer")

    def loop(self) -> None:
        self.start(302, {"Location": self.path}, 0, "")
        raise ConnectionError("a whole answer")

    def in_the_body(self, how: str) -> None:
        """Let the headers pass, then break off, stop or dawdle."""
        write, handler, sent = self.wfile.write, self, []

        def body(data: bytes) -> None:
            sent.append(data)
            if len(sent) == 1:
                write(data)
                return
            for start in range(0, len(data), step := max(1, len(data) // 8)):
                if how != "dawdle" and start >= len(data) // 2:
                    handler.hang() if how == "stall" else handler.cut()
                write(data[start : start + step])
                handler.server.released.wait(0.02)

        self.wfile.write = body


WAYS = {
    "429": lambda handler: handler.busy(429),
    "429, asking for an hour": lambda handler: handler.busy(429, **{"Retry-After": "3600"}),
    "429, asking for a second": lambda handler: handler.busy(429, **{"Retry-After": "1"}),
    "429, its limit lasting for an hour": lambda handler: handler.busy(429, RateLimit='"api";r=0;t=3600'),
    "500": lambda handler: handler.busy(500),
    "503": lambda handler: handler.busy(503),
    "503, asking for an hour": lambda handler: handler.busy(503, **{"Retry-After": "3600"}),
    "cut before any byte": FailingHandler.cut,
    "cut in the body": lambda handler: handler.in_the_body("cut"),
    "silent": FailingHandler.hang,
    "stalled in the body": lambda handler: handler.in_the_body("stall"),
}
ALWAYS = {"a login page": FailingHandler.page, "a redirect to itself": FailingHandler.loop}
SLOW = {"slow": lambda handler: handler.in_the_body("dawdle")}
PATIENCE = 300  # seconds that a failing Hub may hold a user up, whatever it does
ALL_WAYS = WAYS | ALWAYS
WAYS |= ALWAYS | SLOW


@pytest.fixture(scope="session")
def hub_root(task: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model, root / "models" / MODEL)
    # Without it the tokenizer's type is told by config.json alone, which AutoTokenizer does without if it gets a 503.
    (root / "models" / MODEL / "tokenizer_config.json").unlink()
    for split in ("train", "test"):
        rows = (task / "data" / f"{split}.jsonl").read_bytes().splitlines(keepends=True)
        for index, subset in enumerate(SUBSETS):  # other rows in each, as in the real ones
            folder = root / "datasets" / DATA / subset
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(b"".join(rows[index :: len(SUBSETS)])))
    red_team = root / "datasets" / DATA / "red-team-attempts" / "red_team_attempts.jsonl.gz"
    red_team.parent.mkdir()
    red_team.write_bytes(gzip.compress(json.dumps([{"transcript": "not a preference pair"}]).encode()))
    (root / "datasets" / DATA / "README.md").write_text("---\nlicense: mit\ntags:\n- human-feedback\n---\n")
    return root


@pytest.fixture
def serve(hub_root: Path) -> Iterator[Any]:
    """Start a stand-in; `.url`, `.seen` (requests) and `.fail` (which of them get a 503) are its own."""
    running = []

    def start(fail_every: int = 0, truncate_once: tuple = ()) -> Server:
        args = argparse.Namespace(root=hub_root, port=0, sha={MODEL: MODEL_SHA, DATA: DATA_SHA}, log=None)
        server = Server(argparse.Namespace(**vars(args), fail_every=fail_every, truncate_once=truncate_once))
        server.RequestHandlerClass = FailingHandler
        server.seen, server.fail, server.url = [], lambda number, path: False, f"http://127.0.0.1:{server.server_port}"
        server.way, server.released, server.hung = "503", threading.Event(), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.released.set()
        server.shutdown()
        server.server_close()


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# In this process: the loading functions


@pytest.fixture
def use(tmp_path: Path, monkeypatch) -> Any:
    """Point this process's clients at a Hub, with a fresh cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(hub_clients, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the clients' own back-off

    def at(url: str, cache: str = "cache") -> None:
        hub_clients.unreachable.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / cache))

    yield at
    hub_clients.unreachable.cache_clear()


LOAD = {
    "tokenizer": lambda name=MODEL, revision=MODEL_SHA: load_tokenizer(name, revision),
    "model": lambda name=MODEL, revision=MODEL_SHA: load_model(name, revision),
    "dataset": lambda name=DATA, revision=DATA_SHA: hub_clients.download_dataset(name, revision, None),
}


def what(loaded: Any) -> Any:
    """What must be the same however the Hub behaved."""
    if isinstance(loaded, Path):
        return sorted((str(path.relative_to(loaded)), path.stat().st_size) for path in loaded.rglob("*.gz"))
    if hasattr(loaded, "backend_tokenizer"):
        return type(loaded).__name__, loaded.name_or_path, loaded.eos_token, loaded.backend_tokenizer.to_str()
    return type(loaded).__name__, sum(float(p.abs().sum()) for p in loaded.parameters())


@pytest.mark.parametrize("kind", LOAD)
def test_any_one_failed_request_changes_nothing(serve, use, kind: str, caplog):
    server = serve()
    use(server.url)
    expected, requests = what(LOAD[kind]()), len(server.seen)
    assert requests > 3, "nothing was asked of the Hub"
    for failing in range(2, requests + 1):  # the first is the question whether it is there
        use(server.url, f"cache-{failing}")
        server.seen.clear()
        server.fail = lambda number, path, failing=failing: number == failing
        caplog.clear()
        assert what(LOAD[kind]()) == expected, f"after a 503 to {server.seen[failing - 1]} something else was loaded"
        noise = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert not noise, f"after a 503 to {server.seen[failing - 1]} a library complains: {noise}"


@pytest.mark.parametrize("kind", LOAD)
def test_a_hub_that_keeps_failing_is_one_sentence(serve, use, kind: str, monkeypatch):
    server = serve()
    use(server.url)
    # The clients' own back-off would have taken longer than there is patience for.
    clock = SimpleNamespace(sleep=time.sleep, monotonic=itertools.count(step=20).__next__)
    monkeypatch.setattr(hub_clients, "time", clock)
    server.fail = lambda number, path: path.endswith((".json", ".safetensors", ".gz"))
    with pytest.raises(UserError, match="could not be loaded") as caught:
        LOAD[kind]()
    name = DATA if kind == "dataset" else MODEL
    assert name in str(caught.value) and "503" in str(caught.value) and "make quickstart" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.seen) < 100, f"{len(server.seen)} requests to a Hub that fails: patience must end"


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """What the clients sleep for; a silence ends after 0.3 s in place of 10."""
    from huggingface_hub import constants

    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    return slept


def body_of(kind: str, path: str) -> bool:
    """Whether a request is for what matters: weights, tokenizer or rows, and the list of the files."""
    return path.endswith((".safetensors", "tokenizer.json", "test.jsonl.gz")) or (kind != "model" and "/tree/" in path)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ALWAYS])
@pytest.mark.parametrize("kind", [pytest.param("model", marks=pytest.mark.slow), "dataset"])
def test_one_failure_of_any_kind_is_got_over(serve, use, waits, kind: str, way: str):
    server = serve()
    use(server.url)
    expected = what(LOAD[kind]())
    use(server.url, "again")
    server.way, failed = way, set()
    server.fail = lambda number, path: body_of(kind, path) and not (path in failed or failed.add(path))
    assert what(LOAD[kind]()) == expected, f"{way}: something else is loaded"
    assert failed, "nothing failed: nothing is tried here"


@pytest.mark.parametrize("way", ALL_WAYS)
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tokenizer", "model")), "dataset"]
)
def test_a_hub_that_fails_for_good_is_one_sentence_in_bounded_time(
    serve, use, waits, kind: str, way: str, caplog, monkeypatch
):
    server = serve()
    use(server.url)
    server.way, server.fail = way, lambda number, path: number > 1 and ("/tree/" in path or "/resolve/" in path)
    # The time as it would be had this test slept for what the clients ask, and sat through 10 s of each silence.
    clock = SimpleNamespace(
        sleep=waits.append, monotonic=lambda: time.monotonic() + sum(waits) + 10 * len(server.hung)
    )
    monkeypatch.setattr(hub_clients, "time", clock)
    start = clock.monotonic()
    with pytest.raises(UserError, match=r"could not be loaded|not in the cache") as caught:
        LOAD[kind]()
    took = clock.monotonic() - start
    told = str(caught.value)
    assert (DATA if kind == "dataset" else MODEL) in told and "make quickstart" in told, f"{way}: {told}"
    assert took < PATIENCE, f"{way}: a user waits for {took:.0f} s"
    assert len(server.seen) < 150, f"{way}: {len(server.seen)} requests"
    noise = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not noise, f"{way}: a library complains: {noise}"


@pytest.mark.parametrize(("status", "calls"), [(503, 4), (429, 4), (404, 1), (401, 1)])
def test_patience_ends(monkeypatch, status: int, calls: int):
    from huggingface_hub.errors import HfHubHTTPError

    monkeypatch.setattr(hub_clients, "FIRST_PAUSE", 0.0)
    made = []

    def load() -> None:
        made.append(None)
        busy = HfHubHTTPError.__new__(HfHubHTTPError)
        busy.response = SimpleNamespace(status_code=status)
        raise OSError("as transformers wraps it") from busy

    with pytest.raises(OSError, match="wraps"):
        hub_clients.retry_hub(load)
    assert len(made) == calls, f"{len(made)} attempts after a {status}"


@pytest.mark.parametrize("kind", LOAD)
def test_what_the_hub_does_not_have_is_named(serve, use, kind: str):
    use(serve().url)
    thing = "dataset" if kind == "dataset" else "model"
    for missing in ("nobody/nothing", "runs/recipe/sft", "no such name"):
        with pytest.raises(UserError, match=f"there is no {thing} '{missing}'.*local path.*make quickstart"):
            LOAD[kind](missing, None)
    with pytest.raises(UserError, match=f"has no revision 'abcdef'; check --{thing}_revision"):
        LOAD[kind](revision="abcdef")


@pytest.mark.parametrize(("kind", "name"), [("tokenizer", "tokenizer.json"), ("model", "model.safetensors")])
def test_a_download_cut_halfway_is_taken_up_again(serve, use, kind: str, name: str):
    use(serve().url)
    expected = what(LOAD[kind]())
    use(serve(truncate_once=(name,)).url, "cut")
    assert what(LOAD[kind]()) == expected


@pytest.mark.parametrize("kind", LOAD)
def test_an_unreachable_hub_is_one_sentence_or_the_cache(serve, use, kind: str):
    server = serve()
    use(server.url)
    expected = what(LOAD[kind]())
    use(closed_port())
    assert what(LOAD[kind]()) == expected, "what the cache holds is not used without network"
    use(closed_port(), "empty")
    with pytest.raises(UserError, match=r"not in the cache and http.* cannot be reached .*refused.*make quickstart"):
        LOAD[kind]()


def test_damaged_weights_are_named(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "cut"
    shutil.copytree(tiny_model, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cut or damaged") as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value)


def test_pickled_weights_are_refused(tiny_model: Path, tmp_path: Path):
    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(str(folder))


def test_local_folders_ask_nothing_of_the_hub(use, tiny_model: Path):
    use(closed_port())
    assert load_tokenizer(str(tiny_model)).eos_token_id is not None
    assert load_model(str(tiny_model)).training is False
    assert hub_clients.unreachable.cache_info().currsize == 0, "local paths wait for a Hub that they do not need"


def test_a_tokenizer_without_an_end_is_refused(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "endless"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    with pytest.raises(UserError, match="eos_token"):
        load_tokenizer(str(folder))


# In processes of their own: the scripts, as a user runs them


def run(script: str, *argv: str, url: str, home: Path, **more: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ACCELERATE_"))}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    command = [sys.executable, f"scripts/{script}", *RECIPE, *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def one_sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, f"a mistake exits with {done.returncode}: {done.stderr}"
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, f"not one sentence: {done.stderr}"
    return done.stderr


def test_inspecting_the_real_ids_on_a_hub_that_fails_at_times(serve, tmp_path: Path):
    server = serve(fail_every=6)
    done = run("inspect_data.py", "--json", str(tmp_path / "figures.json"), url=server.url, home=tmp_path / "home")
    assert done.returncode == 0, f"one 503 in six ends the run: {done.stderr}"
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["train"]["pairs_in"], figures["test"]["pairs_in"]) == (96, 32), "not the four preference folders"
    asked = [line for line in server.seen if MODEL in line or DATA in line]
    assert asked and all(MODEL_SHA in line or DATA_SHA in line for line in asked), (
        f"not at the pinned commits: {asked}"
    )
    assert "may be offensive" in done.stdout, "nothing warns of what the data hold"


def test_training_on_the_real_ids_and_again_without_network(serve, tmp_path: Path):
    server = serve(truncate_once=("model.safetensors",))
    home, first, second = tmp_path / "home", tmp_path / "first", tmp_path / "second"
    done = run("sft.py", *SMALL, "--output_dir", str(first), url=server.url, home=home)
    assert done.returncode == 0, f"weights cut once are not loaded again: {done.stderr}"
    assert (first / "model.safetensors").is_file() and (first / "train_results.json").is_file()
    assert any("model.safetensors" in line and MODEL_SHA in line for line in server.seen)
    server.seen.clear()
    again = run("sft.py", *SMALL, "--output_dir", str(second), url=server.url, home=home, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, f"the cache is not enough with HF_HUB_OFFLINE=1: {again.stderr}"
    assert not server.seen, f"offline, and yet the Hub was asked: {server.seen}"
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_filled_cache_is_enough_without_network(serve, tmp_path: Path):
    home = tmp_path / "home"
    assert run("sft.py", *SMALL, "--output_dir", str(tmp_path / "a"), url=serve().url, home=home).returncode == 0
    start = time.monotonic()
    done = run("sft.py", *SMALL, "--output_dir", str(tmp_path / "b"), url=closed_port(), home=home)
    assert done.returncode == 0, f"the cache is not enough without network: {done.stderr}"
    assert time.monotonic() - start < 90, "without network the run waits and waits for the Hub"


def test_training_on_what_is_missing_writes_nothing(serve, tmp_path: Path):
    out, wrong = tmp_path / "out", ["--dataset_revision", "abcdef"]
    done = run("sft.py", *SMALL, *wrong, "--output_dir", str(out), url=serve().url, home=tmp_path / "home")
    assert "dataset Anthropic/hh-rlhf has no revision 'abcdef'" in one_sentence(done)
    assert not out.exists(), "a run that never began left a folder behind"


def test_without_network_and_cache_it_says_what_to_do(tmp_path: Path):
    out, start = tmp_path / "out", time.monotonic()
    done = run("sft.py", *SMALL, "--output_dir", str(out), url=closed_port(), home=tmp_path / "home")
    took = time.monotonic() - start
    told = one_sentence(done)
    assert MODEL in told and "make quickstart" in told and "local path" in told
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("1 process "), (
        f"more than the header: {done.stdout}"
    )
    assert took < 60, f"{took:.0f} s until a missing network is told"
    assert not out.exists()


SECRET = "hf_ThisMustNeverBeSeen"


@pytest.mark.parametrize(
    "way", ["429", "503", "cut before any byte", "cut in the body", "a login page", "a redirect to itself"]
)
def test_no_token_or_password_is_told(serve, use, waits, way: str, monkeypatch, capfd, caplog):
    server = serve()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.way, server.fail = way, lambda number, path: number > 1
    for kind in LOAD:
        use(server.url.replace("//", "//someone:open-sesame@"), f"cache-{kind}")
        with pytest.raises(UserError) as caught:
            LOAD[kind]()
        assert server.seen, "nothing was asked of the Hub"
        everything = str(caught.value) + "".join(capfd.readouterr()) + caplog.text
        for secret in (SECRET, "open-sesame"):
            assert secret not in everything, f"{kind}, {way}: {everything}"


@pytest.mark.slow
def test_no_token_or_password_in_a_run(serve, tmp_path: Path):
    server, out, home = serve(truncate_once=("model.safetensors",)), tmp_path / "out", tmp_path / "home"
    url = server.url.replace("//", "//someone:open-sesame@")
    done = run("sft.py", *SMALL, "--output_dir", str(out), url=url, home=home, HF_TOKEN=SECRET)
    assert done.returncode == 0, f"an address with a password does not work: {done.stderr}"
    gone = run("sft.py", *SMALL, "--output_dir", str(tmp_path / "no"), home=tmp_path / "other", HF_TOKEN=SECRET,
               url=closed_port().replace("//", "//someone:open-sesame@"))  # fmt: skip
    assert gone.returncode == 1
    for secret in (SECRET, "open-sesame"):
        assert secret not in done.stdout + done.stderr + gone.stdout + gone.stderr, f"{secret} is printed"
        for path in (path for path in out.rglob("*") if path.is_file()):
            assert secret.encode() not in path.read_bytes(), f"{secret} stands in {path.name}"
