"""A folder of transformers on disk: its tensors, and how the weight table of its architecture accounts for them.

Reads headers, never the tensors. Imports everything of this package below it, and safetensors: no torch.
"""
