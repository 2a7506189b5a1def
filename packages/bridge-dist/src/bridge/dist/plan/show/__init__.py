"""Plans and searches for people: tables on the terminal, and the page of ``bridge plan --html``.

It may import everything else of the planner, and nothing of the planner imports it.
"""
