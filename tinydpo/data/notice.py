"""What the authors of HH-RLHF say of its text, shown wherever that text may appear."""

from tinydpo.config.arguments import as_list

CONTENT_NOTICE = (
    "The Anthropic HH-RLHF data hold text that may be offensive or upsetting, violence, abuse and discrimination "
    "included. Its authors share it for research on making models less harmful; a model trained on it may repeat it."
)


def is_hh(datasets: str | list[str] | None) -> bool:
    """Whether Anthropic's HH-RLHF is among data sets, by its name."""
    return any("hh-rlhf" in name.lower() for name in as_list(datasets))
