"""An exact plan of any cluster layout, without GPUs: see ``plan.plan``.

Imports go one way: ``virtual_rank``, ``count``, ``plan``, ``forecast``, ``show``; each may import those before it, and
all may import ``results`` and the rest of ``bridge.dist`` but ``run`` and the commands.
"""
