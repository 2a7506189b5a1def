"""Measurement of one rank: its real stages are built, wrapped and run on the meta device, and their cost is counted.

Of the planner, it may import only ``virtual_rank``.
"""
