"""Fixtures of the training tests."""

from typing import Any

import pytest
from engines import tiny_gpt2


@pytest.fixture(autouse=True, scope="module")
def few_threads(one_thread: None) -> None:
    """All of these models are tiny."""


@pytest.fixture(scope="module")
def gpt2(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random GPT-2 in which it matters what is seen and where."""
    return tiny_gpt2(tiny_tokenizer, tmp_path_factory.mktemp("gpt2"))
