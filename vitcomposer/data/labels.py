"""The label of samples that only give every rank the same number of samples; metrics leave them out."""

IGNORE_LABEL = -100  # torch's cross-entropy and torchmetrics (ignore_index) leave it out
