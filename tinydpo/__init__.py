"""What TRL lacks for the DPO paper's dialogue task: pairs that survive a small token budget, and honest evaluation."""

__version__ = "0.1.0"
