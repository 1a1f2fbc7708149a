"""What TRL lacks for the DPO paper's dialogue task: pairs that survive a small token budget, and honest evaluation."""

import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16 bitsandbytes, which peft imports, asks at every start for a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
