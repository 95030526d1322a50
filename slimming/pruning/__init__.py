"""Prune networks, and prove that the slim network computes the same."""
