"""Writes the files with which schedulers and shells start a run."""
