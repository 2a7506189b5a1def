"""Writing configurations and single values as plain data.

It may import `schema` and the modules below it.
"""
