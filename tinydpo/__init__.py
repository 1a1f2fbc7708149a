"""What TRL lacks for the DPO paper's dialogue task: pairs that survive a small token budget, and honest evaluation."""

import logging
import os

__version__ = "0.1.0"

# On CPUs with AVX512-BF16 bitsandbytes, which peft imports, asks at every start for a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# On Hopper PyTorch prefers cuDNN's attention, which plans for up to a second at every new shape of a batch.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
