"""The commands of bridge-models. Each imports what it needs when it runs.

Importing them does not import torch, so `bridge --help` stays fast.
"""
