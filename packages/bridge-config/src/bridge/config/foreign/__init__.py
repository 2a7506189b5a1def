"""Documents of other systems: recognized and converted to Bridge's form. It also writes `run_config.yaml` for them.

It imports the schema and the errors, paths and problems of `bridge.config`, and nothing that reads or creates
configurations.
"""
