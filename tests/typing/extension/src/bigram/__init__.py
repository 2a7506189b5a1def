"""A model family outside Bridge. No import of torch here: commands find presets and rules through this package."""
