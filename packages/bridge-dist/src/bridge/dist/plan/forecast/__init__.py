"""Forecasts from plans: pipeline timeline, step time on a machine, search for layouts, and advice.

It may import ``virtual_rank``, ``count``, ``plan`` and ``results``.
"""
