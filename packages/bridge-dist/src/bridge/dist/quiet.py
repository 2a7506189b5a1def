"""Imported before Megatron by the command line: keeps what it says about missing CUDA libraries off the terminal.

And what ModelOpt, and torch while it reads a checkpoint, say of themselves. Libraries that need a GPU are missing where
none is visible.
"""

from __future__ import annotations

import logging
import warnings

from bridge.dist.gpu_libraries import hide_when_megatron_comes

hide_when_megatron_comes()
warnings.filterwarnings("ignore", module=r"(megatron|modelopt|torch\.distributed\.checkpoint)\.")
warnings.filterwarnings("ignore", category=SyntaxWarning)  # of files that are compiled for the first time
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
