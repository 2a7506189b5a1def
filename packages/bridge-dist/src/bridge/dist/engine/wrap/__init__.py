"""Wrapping stages for data parallelism: what every wrapper needs, and a file for each of them.

It imports the rest of the engine and what that may import; only ``engine.build`` imports it.
"""
