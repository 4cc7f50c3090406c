"""What the network gets: the first batch of a run beside the images that it was made of."""
