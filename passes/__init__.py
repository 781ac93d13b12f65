"""The passes, in the order they run: normalize, annotate, split, partition, hoist, lower."""
