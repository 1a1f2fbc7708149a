"""What a person sees while a model trains: a bar, and one short line per log.

Every value of a log, of which this shows five, goes to `trainer_state.json` and to the trackers of `--report_to`.
"""

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

# How each value of a log is shown; DPO's names and the reward model's.
SHOWN = {
    "loss": "loss {:.3f}",
    "rewards/accuracies": "accuracy {:.0%}",
    "accuracy": "accuracy {:.0%}",
    "rewards/margins": "margin {:.2f}",
    "margin": "margin {:.2f}",
    "pairs_per_second": "{:,.3g} pairs/s",
}


class ProgressBar(ProgressCallback):
    """transformers' progress bar, without the dict that it prints for each log."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class ShortLog(TrainerCallback):
    """Prints a line for each log: step, loss, accuracy, margin, speed and the time left."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.monotonic()
        self._first_step = state.global_step  # above 0 after a resume

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        trained = [text.format(logs[key]) for key, text in SHOWN.items() if key in logs]
        held_out = [text.format(logs[f"eval_{key}"]) for key, text in SHOWN.items() if f"eval_{key}" in logs]
        step = f"step {state.global_step}/{state.max_steps}"
        if held_out:
            tqdm.write("  ".join([step, "held out:", *held_out]))
        elif trained:  # the last log has totals only
            tqdm.write("  ".join([step, *trained, f"{self._format_time_left(state)} left"]))

    def _format_time_left(self, state: Any) -> str:
        seconds_per_step = (time.monotonic() - self._start) / max(1, state.global_step - self._first_step)
        return format_duration(seconds_per_step * (state.max_steps - state.global_step))


def format_duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def show_progress(trainer: Any) -> None:
    """Replace what transformers prints while a trainer trains."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ShortLog)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar)
