"""Running jobs and commands: ranks and how they meet, devices, reports, comparisons of training runs, and the commands.

May import everything else of this package, which imports nothing of this; nothing imports `commands`.
"""
