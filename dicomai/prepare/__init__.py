"""From stored objects to what a network and a person see."""
