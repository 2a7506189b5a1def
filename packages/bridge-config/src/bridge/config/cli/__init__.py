"""The command line: the `bridge` command, and the commands of bridge-config.

It imports everything of `bridge.config`; nothing imports it but entry points and tests.
"""
