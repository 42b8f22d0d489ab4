"""Faults injected on purpose: damaged configs, checkpoints, data sets, output folders, environments and numbers.

`python -m tests.faults` runs all of it and prints a table; `make test` runs a short share of every kind. Each attempt
is drawn from a seed, and one that fails can be repeated alone: `python -m tests.faults configs --seed 3 --only 17`.
"""
