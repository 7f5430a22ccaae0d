"""The embedded model and its tasks: how they were made."""
