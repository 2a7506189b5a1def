"""Simulation of one rank of a job: its process groups, the global state of its process, and the answers of its peers.

It imports no other subpackage of the planner.
"""
