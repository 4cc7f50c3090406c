"""Speed of the input path: images per CPU second against peers, in turns on one core."""
