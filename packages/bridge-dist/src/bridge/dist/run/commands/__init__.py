"""The commands `bridge build`, `verify`, `plan`, `search` and `compare`, one module each; nothing imports them.

They may import everything else of this package; importing them must not import torch, so that `bridge -h` stays fast.
"""
