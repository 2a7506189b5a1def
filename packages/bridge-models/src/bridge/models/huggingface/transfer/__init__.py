"""Move weights between folders of transformers and the stages of this rank, row by row, without collectives.

Imports everything of this package below it, bridge.dist, torch and megatron-core.
"""
