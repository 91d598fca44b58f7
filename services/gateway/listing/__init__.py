"""Lists of jobs: an index in memory, read from the streams and thrown away with the process."""
