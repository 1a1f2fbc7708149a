"""What transformers makes only when training begins, after data, model and reference pass, made once beforehand."""

import contextlib
import copy
from typing import Any

from tinydpo.errors import UserError


def check_reporters(training: Any) -> None:
    """Make a run's reporters, and an optimizer and a schedule like its own.

    Args:
        training: transformers' `TrainingArguments`.

    Raises:
        UserError: one of them cannot be made (a package is missing, an option unknown), or would not read an option.
    """
    for name in training.report_to:
        try:
            _make_reporter(name)
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"report_to is {name}: {error} Or pass --report_to none") from None
    try:
        _make_optimizer(training)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        settings = f"optim is {training.optim.value}, lr_scheduler_type {training.lr_scheduler_type.value}"
        raise UserError(f"{settings}: {error}") from None


def _make_reporter(name: str) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import get_reporting_integration_callbacks

    (reporter,) = get_reporting_integration_callbacks([name])
    made = reporter.__new__(reporter)
    try:
        made.__init__()
    except Exception:
        made.__class__ = TrainerCallback  # half a reporter prints a traceback when it goes
        raise


def _make_optimizer(training: Any) -> None:
    import torch
    from transformers import Trainer, get_scheduler

    if training.optim_target_modules and not any(name in training.optim.value for name in ("galore", "apollo")):
        raise ValueError("optim_target_modules is for galore and apollo; leave it out")
    if any("=" not in part for part in (training.optim_args or "=").split(",")):
        raise ValueError(f"optim_args is {training.optim_args}; write name=value, with commas between several")
    if training.optim_target_modules:
        with contextlib.suppress(ValueError):  # it wants a model, after it has looked for its package
            Trainer.get_optimizer_cls_and_kwargs(training)
        return
    plain = copy.copy(training)
    plain.optim_args = None
    made, options = Trainer.get_optimizer_cls_and_kwargs(training)
    if training.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
        raise ValueError(f"this optimizer reads nothing of optim_args {training.optim_args}; leave it out")
    if not isinstance(made, type):
        return  # it takes a whole model
    optimizer = made([torch.nn.Parameter(torch.zeros(1, device=training.device))], **options)
    schedule = training.lr_scheduler_kwargs
    get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(100), 100, schedule)
