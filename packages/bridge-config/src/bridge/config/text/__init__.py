"""Documents as text: YAML 1.2 and JSON, read with the position of every value, written, and edited in place.

It imports the errors, paths and problems of `bridge.config`, and nothing that knows classes or configurations.
"""
