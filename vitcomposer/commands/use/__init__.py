"""Commands that do something with a trained network."""
