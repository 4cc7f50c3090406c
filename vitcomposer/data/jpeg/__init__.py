"""Decodes images to pixels, whole or only the part that a crop needs, resizes them, and makes JPEGs seekable."""
