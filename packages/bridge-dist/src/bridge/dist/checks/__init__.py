"""Checks around a build: documents, pre-flight rules, agreement between ranks, and built stages.

May import ``layout``, ``document_layout``, ``wrapper``, ``internals`` and ``errors``. Only ``agreement`` and
``stages``, which run in processes that build, import torch.
"""
