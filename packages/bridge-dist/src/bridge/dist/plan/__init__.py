"""The planner: memory, computation and communication of a job with any layout, without GPUs; see ``plan.plan``.

The layers are, lowest first, ``virtual_rank``, ``count``, ``plan``, ``forecast`` and ``show``. Each may import those
below it. All may import ``results`` and the rest of ``bridge.dist``, except ``run`` and the commands.
"""
