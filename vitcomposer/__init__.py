"""Train Vision Transformers fast and accurately on MosaicML Composer."""

__version__ = "0.2.0"
