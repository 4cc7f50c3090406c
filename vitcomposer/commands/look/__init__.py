"""Commands that show what a run, a network or a data set holds."""
