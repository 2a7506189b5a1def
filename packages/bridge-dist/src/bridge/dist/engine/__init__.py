"""Building, placing and wrapping the stages of this rank.

It imports the layout, the checks and the errors; the command line and the plan import it.
"""
