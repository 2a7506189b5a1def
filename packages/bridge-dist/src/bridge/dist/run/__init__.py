"""Running jobs: starting ranks, what each rank does, and the reports of it. Nothing below imports it."""
