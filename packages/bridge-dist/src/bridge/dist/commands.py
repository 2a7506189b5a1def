"""The command `bridge build`. Importing it does not import torch."""
