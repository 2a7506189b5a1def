"""Models for Bridge: a configuration and a builder each, in a module of their own. Importing this imports no torch."""
