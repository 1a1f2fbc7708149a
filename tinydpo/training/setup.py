"""How every training begins: what runs is checked and said, a finished run is told, and model and pairs must fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset

from tinydpo.config.arguments import DataArguments, RunArguments, find_reference
from tinydpo.config.flags import check_flags, check_reporters
from tinydpo.config.launch import prepare_process
from tinydpo.data.inspect import format_data_notes
from tinydpo.data.pairs import load_pairs
from tinydpo.data.splits import HOLD_OUT_SEED
from tinydpo.errors import UserError, get_rank
from tinydpo.files import RUN_CONFIG
from tinydpo.models.hub import explain_load_errors
from tinydpo.models.loading import check_same_vocabulary, load_tokenizer, refuse_adapter
from tinydpo.training.train import FINISHED, is_finished

Trainer = TypeVar("Trainer")


class TrainingData(NamedTuple):
    """What a trainer is made of, besides its model: `test` is None where training does not evaluate.

    `train` and `test` are fitted pairs; `summary` says, by split, what fitting did to them; `texts` are the
    ones of `train`.
    """

    tokenizer: Any
    train: Dataset
    test: Dataset | None
    summary: dict[str, Any]
    texts: Dataset


def prepare_training(
    data: DataArguments,
    run: RunArguments,
    training: Any,
    model: Any,
    resolved: dict[str, Any],
    need_pairs: bool = True,
) -> TrainingData | None:
    """Everything before the trainer; None, said in one line, where the folder holds this very run, finished.

    Args:
        data: which pairs.
        run: how they run.
        training: transformers' `TrainingArguments`.
        model: TRL's `ModelConfig`.
        resolved: every key of the run with its value.
        need_pairs: whether every row must have a rejected answer; SFT does without.

    Raises:
        UserError: a flag would have no effect, or the machine, the folder, the model or the data are not what the run
            needs.
    """
    stage = type(training).__name__.removesuffix("Config").lower()
    check_flags(stage, resolved, training, model)
    check_reporters(training)
    prepare_process(training, model, run.accelerate_config)
    if is_finished(training.output_dir, resolved):
        return None
    name, revision = model.model_name_or_path, model.model_revision
    tokenizer = apply_tokenizer_flags(load_tokenizer(name, revision, training.trust_remote_code), training)
    check_model(name, revision, tokenizer, training.max_length, training.trust_remote_code)
    if reference := find_reference(resolved):
        theirs = load_tokenizer(*reference, training.trust_remote_code)
        check_same_vocabulary(tokenizer, theirs)
        check_model(*reference, tokenizer, training.max_length, training.trust_remote_code)
    splits = load_pairs(data, tokenizer, training.max_length, need_pairs, training.dataset_num_proc)
    summary = {name: split.summary for name, split in splits.items()}
    if not get_rank() and (line := format_data_notes(summary)):
        print(line)
    test = draw_eval_pairs(splits["test"].pairs, run.eval_pairs) if training.eval_strategy != "no" else None
    return TrainingData(tokenizer, splits["train"].pairs, test, summary, splits["train"].texts)


def build_trainer(construct: Callable[[], Trainer], model: Any) -> Trainer:
    """Construct a trainer, which loads the model of TRL's `ModelConfig`; what cannot be loaded, or does not fit
    together, is one sentence."""
    try:
        with explain_load_errors("model", model.model_name_or_path, model.model_revision, also=()):
            return construct()
    except (ValueError, NotImplementedError, ImportError, TypeError) as error:
        raise UserError(str(error)) from None


def apply_tokenizer_flags(tokenizer: Any, training: Any) -> Any:
    """A tokenizer with the end token and the chat template that SFT's flags name, before it sees the first row.

    Raises:
        UserError: it has no such token, or the template cannot be read.
    """
    from jinja2 import TemplateSyntaxError

    end, path = (getattr(training, name, None) for name in ("eos_token", "chat_template_path"))
    if end is not None:
        if end not in tokenizer.get_vocab():
            raise UserError(f"eos_token is {end!r}, which is no token of {tokenizer.name_or_path}; name one that is")
        tokenizer.eos_token = end
    if path is not None:
        file = Path(path)
        if not (file.is_file() and file.suffix in (".jinja", ".j2")):
            raise UserError(
                f"chat_template_path is {path}; give a .jinja or .j2 file (another model's folder has "
                "chat_template.jinja), whose special tokens the model must know: none are added"
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        except TemplateSyntaxError as error:
            raise UserError(f"chat_template_path {path}, line {error.lineno}: {error}") from None
        except Exception:  # whatever a template raises that wants other messages: it gets those of the rows
            pass
    return tokenizer


def check_model(
    name: str, revision: str | None, tokenizer: Any, max_length: int, trust_remote_code: bool = False
) -> None:
    """Refuse the model of a run that has not finished, sequences longer than a model has positions, or a tokenizer
    with more tokens than it has embeddings."""
    from transformers import AutoConfig

    if (Path(name) / RUN_CONFIG).exists() and not (Path(name) / FINISHED).exists():
        raise UserError(f"{name} holds a run that has not finished; run the command that began it again, it goes on")
    if (Path(name) / "adapter_config.json").exists():
        return
    with explain_load_errors("model", name, revision):
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
        config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"max_length is {max_length}, but model {name} has {positions} positions; lower --max_length")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"model {name} embeds {config.vocab_size} tokens, its tokenizer has {len(tokenizer)}; they do not match"
        )


def draw_eval_pairs(pairs: Dataset, most: int) -> Dataset:
    """At most `most` rows for evaluation during training, drawn once for all runs."""
    return pairs if len(pairs) <= most else pairs.shuffle(seed=HOLD_OUT_SEED).select(range(most))


def load_reference(resolved: dict[str, Any], training: Any, quantization_config: Any = None) -> Any:
    """Such a reference as `DPOTrainer` takes it, loaded as TRL loads the model itself; None without one.

    Args:
        resolved: every key of the run with its value.
        training: transformers' `TrainingArguments`, after `machine.prepare`.
        quantization_config: the model's own, for its reference as well.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import create_model_from_path

    if (reference := find_reference(resolved)) is None:
        return None
    given = {**training.model_init_kwargs, "revision": reference.revision or "main", "device_map": None}
    given |= {"trust_remote_code": training.trust_remote_code}
    given |= {"quantization_config": quantization_config} if quantization_config else {}
    refuse_adapter(reference.name, "a reference is a plain checkpoint", "pass that folder")
    with explain_load_errors("model", *reference):
        return create_model_from_path(reference.name, AutoModelForCausalLM, **given)
