"""Rows and chat templates that several tests of this folder use, and the way from rows to fitted pairs."""

import copy
import json
from pathlib import Path
from typing import Any

from tinydpo.config.arguments import DataArguments
from tinydpo.data.pairs import FittedSplit, load_pairs
from tinydpo.data.rows import read_row
from tinydpo.data.text import render_row

PROMPT = "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]
GOOD = [{"role": "assistant", "content": "Well."}]
BAD = [{"role": "assistant", "content": "Bad, very bad."}]
SYSTEM = {"role": "system", "content": "Be brief."}
HH = {"chosen": PROMPT + " Well.", "rejected": PROMPT + " Bad, very bad."}
TEXTS = {"prompt": "How are you?", "chosen": "Well.", "rejected": "Bad, very bad."}
MESSAGES = {"prompt": TURNS, "chosen": GOOD, "rejected": BAD}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral's way: roles must alternate, no header before an answer, the end token ends it.
ALTERNATING = (
    "<|start|>{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Gemma's way: what ends a turn is not the end token.
OTHER_END = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Qwen3's way: tools, calls of them, and an empty thought if thinking is off.
THINKING = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% for m in messages %}<turn>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' and enable_thinking is false %}<think></think>{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}{{ eos_token }}\n{% endfor %}{# knows 'tool' #}"
    "{% if add_generation_prompt %}<turn>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)


def with_template(tokenizer: Any, template: str | None) -> Any:
    if template is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if template == CHATML:
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def encode_lines(rows: list) -> bytes:
    """Rows as JSON lines; bytes stay as they are."""
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def load_train(
    folder: Path, tokenizer: Any, *rows: Any, need_pairs: bool = True, max_length: int = 128, **options: Any
) -> FittedSplit:
    """The fitted train split of `rows`, written to `folder`/data beside a small test split."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_bytes(encode_lines(list(rows)))
    (data / "test.jsonl").write_bytes(encode_lines([HH]))
    return load_pairs(DataArguments(dataset_name=str(data), **options), tokenizer, max_length, need_pairs)["train"]


def render(row: dict[str, Any], tokenizer: Any, need_pairs: bool | None = True) -> dict[str, Any]:
    return render_row(read_row(row), tokenizer, need_pairs)
