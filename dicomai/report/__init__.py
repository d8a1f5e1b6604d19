"""The objects that go back: Secondary Capture and Structured Report."""
