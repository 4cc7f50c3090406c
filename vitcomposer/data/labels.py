"""The label of a sample that is only there to give every rank the same number of samples."""

IGNORE_LABEL = -100  # torch's cross-entropy and torchmetrics (ignore_index) leave it out
