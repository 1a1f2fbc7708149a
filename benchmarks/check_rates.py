"""How often the check of packed rows is wrong: false alarms on models that take them, misses on models that do not.

    python benchmarks/check_rates.py --dataset_name my_pairs.jsonl --tokenizer_name openai-community/gpt2
    python benchmarks/check_rates.py --dataset_name my_pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

Each batch is another draw of real pairs. Without --model the models are tiny and random, their weights large enough
that it matters what a token sees and where it stands. Sabotage acts on plain and
packed rows alike, as such a model would.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from models import tokenizer_and_data
from short_products import emulated, short_products
from transformers import PreTrainedModel

from tinydpo.config.arguments import DataArguments
from tinydpo.config.recipe import parse_args
from tinydpo.data.pairs import load_split
from tinydpo.errors import UserError, report_errors
from tinydpo.models.loading import load_model
from tinydpo.models.precision import set_compute_dtype, use_float32_head
from tinydpo.training.logps import check_packed_rows
from tinydpo.training.packing import Tree

ROW, WINDOW, SLOPE = 512, 64, 0.05
MODES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "float32": lambda model: set_compute_dtype(model, torch.float32),
    "bf16 autocast": lambda model: set_compute_dtype(model, torch.bfloat16),
    "bf16 weights": lambda model: use_float32_head(model.bfloat16()),
    "fp16 weights": lambda model: use_float32_head(model.half()),
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY = {
    "GPT2": {"n_embd": 128, "n_layer": 2, "n_head": 2},
    "Qwen2": SMALL | {"num_key_value_heads": 2},
    "GPTNeoX": SMALL,
}


@dataclass
class RateArguments:
    """What to check."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; by default tiny random ones."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Without --model: folder or Hub id."})
    batches: int = field(default=50, metadata={"help": "Draws of real pairs for a model as it is."})
    sabotaged: int = field(default=50, metadata={"help": "Draws for each sabotage."})


def tiny(family: str, vocab_size: int, spread: float = 0.2) -> PreTrainedModel:
    """A random model of a family, its weights of this standard deviation."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=vocab_size, **TINY[family])
    config.initializer_range = spread
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return getattr(transformers, kind)(config).eval()


@torch.no_grad()
def shifted(model: PreTrainedModel, mean: float = -90.0) -> PreTrainedModel:
    """A GPT-2 whose logits all lie lower by as much as a pretrained one's, and whose distributions are what they were.

    One direction is added to every embedding, which its normalizations take out again, and to the last one's bias.
    """
    along = model.transformer.wte.weight.new_ones(model.config.n_embd) / model.config.n_embd**0.5
    model.transformer.wte.weight += 3.0 * along
    model.transformer.ln_f.bias += mean / 3.0 * along
    return model


def sabotage(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """Have a model go by something else than position ids and mask, whatever it is given."""
    forward = model.base_model.forward

    def other(input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        if kind == "ignores positions":
            return forward(input_ids, attention_mask=attention_mask, **kwargs)
        if kind == "ignores the mask":
            return forward(input_ids, position_ids=position_ids, **kwargs)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        behind = places[:, None] - places
        mask, dtype = attention_mask, model.get_input_embeddings().weight.dtype
        if torch.is_autocast_enabled(input_ids.device.type):
            dtype = torch.get_autocast_dtype(input_ids.device.type)
        lowest = torch.finfo(dtype).min
        if mask.dim() == 2:
            seen = (behind >= 0)[None, None] & mask[:, None, None].bool()
            mask = torch.full(seen.shape, lowest, dtype=dtype).masked_fill_(seen, 0)
        if kind == "attends over a window":
            mask = mask.masked_fill(behind >= WINDOW, lowest)
        else:  # ALiBi: the farther behind in the row, the less it counts
            mask = (mask - SLOPE * behind).clamp(min=lowest)
        return forward(input_ids, attention_mask=mask.to(dtype), position_ids=position_ids, **kwargs)

    model.base_model.forward = other
    return model


SABOTAGES = ("ignores positions", "ignores the mask", "attends over a window", "goes by places in the row")


def refused(model: PreTrainedModel, batches: list[list[Tree]]) -> int:
    """For how many batches the check refuses a model."""
    count = 0
    with short_products():
        for trees in batches:
            try:
                check_packed_rows(model, trees, ROW)
            except UserError:
                count += 1
    return count


def main(argv: list[str] | None = None) -> None:
    args, data = parse_args(RateArguments, DataArguments, argv=argv)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_and_data(
            data, args.model or args.tokenizer_name, args.model or "gpt2-tiny", Path(folder)
        )
        pairs = load_split(data, tokenizer, 128, "train").pairs
    batches = []
    for seed in range(max(args.batches, args.sabotaged)):
        rows = pairs.shuffle(seed=seed).select(range(min(64, len(pairs)))).to_list()
        batches.append([(row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])) for row in rows])
    makers = {f"{family}, tiny": (lambda family=family: tiny(family, len(tokenizer))) for family in TINY}
    makers["GPT2, tiny, shifted"] = lambda: shifted(tiny("GPT2", len(tokenizer)))
    if args.model:
        makers = {Path(args.model).name: lambda: load_model(args.model)}
    for dtype in emulated():
        print(f"Products in {dtype} are made in float32 from short inputs, for want of hardware.")
    print(f"Batches refused, of {args.batches} (sabotaged: of {args.sabotaged}); row of {ROW} tokens\n")
    print("| model | computes | right | " + " | ".join(SABOTAGES) + " |\n" + "| --- " * (3 + len(SABOTAGES)) + "|")
    for name, make in makers.items():
        for mode, prepare in MODES.items():
            right = refused(prepare(make()), batches[: args.batches])
            wrong = [refused(sabotage(prepare(make()), kind), batches[: args.sabotaged]) for kind in SABOTAGES]
            print(f"| {name} | {mode} | {right} | " + " | ".join(map(str, wrong)) + " |", flush=True)


if __name__ == "__main__":
    with report_errors():
        main()
