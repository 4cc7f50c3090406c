"""The folder of one run: configuration, checkpoints, metrics, report."""
