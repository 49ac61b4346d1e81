"""The run, on disk or in memory: its manifest and files, checked when they are read."""
