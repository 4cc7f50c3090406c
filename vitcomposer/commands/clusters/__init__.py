"""Commands for machines in the plural."""
