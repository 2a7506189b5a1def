"""Documents of published models, and a tiny one to try things with; each may be named by its stem. There is no code."""
