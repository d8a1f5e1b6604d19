"""The Storage SCP and the folder that keeps what it receives."""
