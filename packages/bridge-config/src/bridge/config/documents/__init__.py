"""Documents: data that remembers where it came from, and the files, presets and overrides that it is made of.

It imports everything of `bridge.config` but the command line. Nothing but the command line and `bridge.config` itself
imports it.
"""
