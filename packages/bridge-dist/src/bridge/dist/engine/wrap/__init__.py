"""Wrap stages for data parallelism: ``data_parallel`` for all wrappers, and one file per wrapper.

May import the rest of the engine and what that may import. Only ``engine.build`` imports it.
"""
