"""How large a network is and how fast."""
