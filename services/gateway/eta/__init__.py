"""Estimates when a job will be done, from finished results and from the jobs that wait and run."""
