"""When a job will be done: learned from results, computed from what waits and what runs."""
