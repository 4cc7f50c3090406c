"""Writes trained models for other programs: timm, ONNX and ``torch.export``."""
