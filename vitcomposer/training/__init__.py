"""Puts network, data, optimizer and algorithms together into a ``composer.Trainer``, and runs it."""
