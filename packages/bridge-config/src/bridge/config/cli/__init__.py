"""The command line: the `bridge` command, and the commands of bridge-config.

It may import everything in `bridge.config`. Only entry points, tests and, of `output`, other commands import it.
"""
