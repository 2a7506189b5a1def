"""What is checked around a build: documents, setups against pre-flight rules, that ranks agree, and built stages.

It imports the layout, documents, the wrappers' names, internals and errors. But for ``agreement`` and ``stages``, which
are for processes that build, importing it imports no torch.
"""
