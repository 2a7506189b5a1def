"""Preset documents: published models and tiny ones for experiments, named by their file stems. Contains no code."""
