"""Several datasets as one: a name that tells each apart, a share of its rows, and a few of all for a first try."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from tinydpo.errors import UserError
from tinydpo.launching.arguments import Source

HOLD_OUT_SEED = 42  # not the run's seed: SFT, DPO and evaluation must draw and hold out the same rows


def draw_share(records: Dataset, share: float) -> Dataset:
    """A share of the records (at least one), in their order: a choice that depends on the data alone."""
    if share == 1:
        return records
    drawn = np.random.default_rng(HOLD_OUT_SEED).permutation(len(records))[: max(1, round(share * len(records)))]
    return records.select(np.sort(drawn))


def draw_rows(records: Dataset, most: int | None) -> Dataset:
    """At most so many records, drawn likewise."""
    return records if most is None else draw_share(records, min(1.0, most / len(records)))


def label_sources(sources: list[Source]) -> list[str]:
    """A name for each of several datasets: as short as tells them apart; of one, none.

    Raises:
        UserError: one stands there twice.
    """
    if len(sources) == 1:
        return [""]
    names = [source.name.rstrip("/") for source in sources]
    for found in (
        [Path(source.data_dir or name).name.split(".")[0] for source, name in zip(sources, names, strict=True)],
        ["/".join(filter(None, (name, source.data_dir))) for source, name in zip(sources, names, strict=True)],
    ):
        if len(set(found)) == len(found):
            return found
    twice = next(name for name in found if found.count(name) > 1)
    raise UserError(f"dataset_name has {twice} twice, so that its rows would count twice; name it once")
