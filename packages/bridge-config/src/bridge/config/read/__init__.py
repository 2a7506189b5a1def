"""Reading documents: brought to their present form, checked against descriptions, and made into configurations.

It may import `write`, `schema` and what lies below them, and the readers of other systems' documents.
"""
