"""Building, placing and wrapping the stages of this rank, from process groups to what trains.

It imports the checks and what they may import; training, the plan and the command line import it.
"""
