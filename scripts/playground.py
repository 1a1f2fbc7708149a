"""Ask a policy and its reference side by side, in the browser; votes become pairs to train on.

    python scripts/playground.py --config recipes/quickstart/evaluate.yaml --port 7861

`make playground RECIPE=recipes/quickstart` runs the same on port 7860. It takes what evaluation takes: models, beta,
max_length, and where the sampling settings start; votes go to `votes.jsonl` next to --output_dir.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from tinydpo.config.arguments import DataArguments
from tinydpo.config.launch import pick_device_and_dtype
from tinydpo.config.recipe import parse_args
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.errors import UserError, report_errors
from tinydpo.evaluation.arguments import EvaluateArguments, RewardArguments
from tinydpo.run_folder import was_trained_on_chat


@dataclass
class PlaygroundArguments:
    """Where the page is served."""

    port: int = HfArg(default=7860, help="Port of the page on 127.0.0.1.")


def main(argv: list[str] | None = None) -> None:
    kinds = (EvaluateArguments, DataArguments, PlaygroundArguments)
    args, data, page = parse_args(
        *kinds, argv=argv, ignored=(RewardArguments,), defaults_from_run="model_name_or_path"
    )

    # These take seconds to import: only once the flags are known to be right.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from tinydpo.playground.app import build_app, serve_app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the playground needs gradio; run `make playground` or pip install '.[playground]'") from None
    from datasets import disable_progress_bars

    from tinydpo.models.loading import load_model
    from tinydpo.playground.side_by_side import SideBySide

    disable_progress_bars()  # each typed pair would show one
    tokenizer = args.load_tokenizer()
    device, dtype = pick_device_and_dtype(args.dtype)
    models = []
    for name, revision in args.models.values():
        models.append(load_model(name, revision, dtype=dtype, device=device))
    chat = was_trained_on_chat(args.model_name_or_path)
    side_by_side = SideBySide(*models, tokenizer, args.beta, args.max_length, data.max_question_length, chat)
    votes = Path(args.output_dir).parent / "votes.jsonl"
    notice = CONTENT_NOTICE if is_hh(data.dataset_name) else ""
    examples = side_by_side.choose_examples(data, args.seed)
    serve_app(build_app(side_by_side, args, votes, notice, examples), page.port)


if __name__ == "__main__":
    with report_errors():
        main()
