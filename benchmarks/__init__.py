"""Repeatable measurements, each with its own naive baseline; each prints a table and writes JSON."""
