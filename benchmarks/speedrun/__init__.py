"""Who reaches a given accuracy in the least time: tracks, a harness that runs and checks an entry, and the table.

    python -m benchmarks.speedrun run digits FILE.yaml --name NAME --seeds 0 1 2
    python -m benchmarks.speedrun check benchmarks/speedrun/entries/digits/NAME
    python -m benchmarks.speedrun table

``README.md`` beside this file has the rules; the table below them is written by ``table``.
"""
