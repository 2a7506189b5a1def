"""Documents of other systems: recognised, converted to Bridge's own form, and run_config.yaml written for them.

It imports the schema and the errors, paths and problems of `bridge.config`, and nothing that reads or makes a config.
"""
