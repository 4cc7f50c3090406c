"""Accuracy of the recipes on small real data, against training FLOPs and against timm's parts."""
