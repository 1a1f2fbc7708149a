"""What the authors of HH-RLHF say of its text, shown wherever that text may appear."""

CONTENT_NOTICE = (
    "The Anthropic HH-RLHF data hold text that may be offensive or upsetting, violence, abuse and discrimination "
    "included. Its authors share it for research on making models less harmful; a model trained on it may repeat it."
)


def is_hh(dataset: str) -> bool:
    """Whether a data set is Anthropic's HH-RLHF, by its name."""
    return "hh-rlhf" in dataset.lower()
