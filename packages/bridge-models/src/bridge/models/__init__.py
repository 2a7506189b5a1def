"""Models for Bridge: a configuration and a builder each, in a module of their own. Importing this imports no torch."""

from bridge.config.noise import silence

silence()  # before megatron-core is imported
