"""What a network is trained to make small, as functions and modules of tensors alone."""

from vitcomposer.losses.supervised import binary_cross_entropy, soft_target_cross_entropy

__all__ = ["binary_cross_entropy", "soft_target_cross_entropy"]
