"""Convert the config.json of transformers to documents and back.

Each architecture has one table (``families``) of rows (``fields``), read in both directions (``convert``). Imports
bridge.config alone: no torch, megatron or transformers.
"""

from bridge.models.huggingface.config_json import load_config_json
from bridge.models.huggingface.convert import Converted, from_hf, to_hf

__all__ = ["Converted", "from_hf", "load_config_json", "to_hf"]
