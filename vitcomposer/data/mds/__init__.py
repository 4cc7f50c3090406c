"""Reads the samples of MDS shards, on disk or through a cache."""
