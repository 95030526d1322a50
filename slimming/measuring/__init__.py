"""Measure the size and speed of networks."""
