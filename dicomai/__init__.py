"""A daemon beside a PACS that scores imaging studies and sends overlays and reports back."""
