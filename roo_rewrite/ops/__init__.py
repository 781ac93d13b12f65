"""Operators on rows: the jagged broadcast and its kin."""
