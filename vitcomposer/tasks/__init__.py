"""ComposerModels: what is a batch, a loss and a metric for each method."""

from vitcomposer.tasks.classification import Classification

__all__ = ["Classification"]
