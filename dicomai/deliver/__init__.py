"""The Storage SCU, and when to try again."""
