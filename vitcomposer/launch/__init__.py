"""Writes the launch files of schedulers and shells."""
