"""Being a rank of a job that does not run: its process groups, the state of its process, what others would tell it.

It imports nothing else of the planner.
"""
