"""The schema of documents: descriptions of classes (live and shipped), allowed names, and valid field values.

This package imports only the errors, paths and problems modules of `bridge.config`, never torch or megatron-core.
"""
