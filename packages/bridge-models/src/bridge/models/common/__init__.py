"""What the models share: the reference API's public path."""
