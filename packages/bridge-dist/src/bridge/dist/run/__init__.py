"""Running of jobs: ranks and their rendezvous, devices, reports, comparison of training runs, and the commands.

May import everything else in this package, which imports nothing from here; nothing imports `commands`.
"""
