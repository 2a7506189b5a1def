"""Documents: data that knows its source, and the files, presets and overrides that it comes from.

It may import everything in `bridge.config` except the command line. Only the command line and `bridge.config` itself
import it.
"""
