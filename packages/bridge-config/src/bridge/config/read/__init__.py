"""Reads documents: migrates them, checks them against descriptions, and builds configurations.

It may import `write`, `schema` and the modules below them, and `foreign`.
"""
