"""What a rank holds, computes and sends: its real stages built, wrapped and run on the meta device, and counted.

It may import ``virtual_rank``.
"""
