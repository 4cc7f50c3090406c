"""From folders and lists of images to MDS shards."""
