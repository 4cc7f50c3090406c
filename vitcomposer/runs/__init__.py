"""Reads and writes the folder of one run: configuration, checkpoints, metrics, report."""
