"""What the scripts call, one file a command."""
