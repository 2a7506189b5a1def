"""The commands of bridge-models; those that belong together share a file. Each imports what is below when it runs.

Importing them imports no torch, so that `bridge --help` stays quick.
"""
