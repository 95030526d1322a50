"""A network -> a slim one, proved."""
