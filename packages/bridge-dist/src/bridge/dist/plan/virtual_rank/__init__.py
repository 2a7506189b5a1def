"""Being a rank of a job that does not run: its process groups, and the state of its process."""
