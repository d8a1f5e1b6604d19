"""From labelled images to a model package."""
