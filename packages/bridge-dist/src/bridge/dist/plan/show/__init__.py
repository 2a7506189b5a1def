"""Views of plans and searches: tables on the terminal, and the page that ``bridge plan --html`` writes.

It may import the rest of the planner, and the rest of the planner does not import it.
"""
