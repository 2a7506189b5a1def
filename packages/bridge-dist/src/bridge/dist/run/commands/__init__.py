"""The commands `bridge build`, `verify`, `plan` and `compare`, a module each; nothing imports them.

They may import everything else of this package; importing them imports no torch, so that `bridge -h` stays quick.
"""
