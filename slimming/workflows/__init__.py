"""The workflows that the scripts run."""
