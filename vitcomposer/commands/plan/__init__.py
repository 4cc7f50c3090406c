"""Commands about recipes: which there are, what they cost, how fast their input is."""
