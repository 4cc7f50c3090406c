"""Writes folders and lists of images as MDS shards: what ``vitcomposer convert`` does."""
