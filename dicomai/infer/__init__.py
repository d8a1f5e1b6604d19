"""Model packages and the forward pass."""
