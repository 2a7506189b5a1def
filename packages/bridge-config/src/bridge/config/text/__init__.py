"""Documents as text: YAML 1.2 and JSON read with the place of every value, written, and changed in place.

It imports the errors, paths and problems of `bridge.config`, and nothing that knows a class or a config.
"""
