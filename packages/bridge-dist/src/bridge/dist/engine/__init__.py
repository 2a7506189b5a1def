"""Building, placing and wrapping the stages of this rank."""
