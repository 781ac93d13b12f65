"""The passes, in the order they run: normalize, annotate, split, partition, hoist, lower."""

import roo_rewrite as roo_rewrite  # whole before any pass: its pipeline imports the passes
