"""Model families for Bridge, each with a configuration and a builder. Importing this package does not import torch."""

from bridge.config.import_warnings import silence_imports

silence_imports()  # before megatron-core is imported
