"""From checked parts to a ``composer.Trainer``, and its run."""
