"""Fixtures of all tests. The environment is set first: `datasets` and `huggingface_hub` read it when imported."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CACHE = tempfile.mkdtemp(prefix="tinydpo-tests-")  # tests neither read nor fill the user's own cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = CACHE
os.environ.pop("TOKENIZERS_PARALLELISM", None)
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; some tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402 - after the environment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def float32_by_default() -> Iterator[None]:
    """Tests compute in float32 on every CPU; `test_bf16.py` does not."""
    import torch
    from running import FAST_BF16

    with pytest.MonkeyPatch.context() as patch:
        for has in FAST_BF16:
            patch.setattr(torch.cpu, has, lambda: False)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pairs and the GPT-2 tokenizer, in a folder beside the repository."""
    folder = ROOT.parent / "shared"
    for needed in ("hh-rlhf", "gpt2-tokenizer"):
        if not (folder / needed).is_dir():
            pytest.skip(f"needs ../shared/{needed}, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared: Path) -> Any:
    """The real one: no BOS token, no chat template, `<|endoftext|>` as its end token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "gpt2-tokenizer")


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy task, small: `data/train.jsonl` (96 pairs), `data/test.jsonl` (32), `base/` (model, tokenizer)."""
    from tinydpo.toy_task import write_task

    folder = tmp_path_factory.mktemp("task")
    write_task(folder / "data", folder / "base", seed=0, train_pairs=96, test_pairs=32)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(task: Path) -> Any:
    """The toy task's tokenizer: byte-level BPE, no BOS token, no chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(task / "base")


@pytest.fixture(scope="session")
def tiny_model(task: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 (2 layers, 64 wide, 192 positions, no dropout) and the tiny tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    folder, end = tmp_path_factory.mktemp("tiny-model"), tiny_tokenizer.eos_token_id
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_positions=192, n_embd=64, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread is fastest for matrices this small, above all while other jobs run."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
