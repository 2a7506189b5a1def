"""Imported before Megatron by the command line: keeps what it says about missing CUDA libraries off the terminal.

And what ModelOpt, and torch while it reads a checkpoint, say of themselves.
"""

from __future__ import annotations

import logging
import warnings

warnings.filterwarnings("ignore", module=r"(megatron|modelopt|torch\.distributed\.checkpoint)\.")
warnings.filterwarnings("ignore", category=SyntaxWarning)  # of files that are compiled for the first time
logging.getLogger("megatron").setLevel(logging.ERROR)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
