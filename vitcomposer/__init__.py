"""Train Vision Transformers fast and accurately on MosaicML Composer."""

__version__ = "0.1.0"
