"""The commands of bridge-models. Each imports its dependencies when it runs.

Importing them does not import torch, so `bridge --help` stays fast.
"""
