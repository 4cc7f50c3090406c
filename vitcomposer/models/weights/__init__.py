"""Reads weights of runs and of other projects, without running code from a file."""
