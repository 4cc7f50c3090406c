"""What a user sees of each fault, and damaged inputs through every path that reads them."""
