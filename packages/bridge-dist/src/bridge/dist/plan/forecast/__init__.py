"""What follows from plans: when each pass runs, how long a step takes on a machine, which layouts and changes are best.

It may import ``virtual_rank``, ``count``, ``plan`` and ``results``.
"""
