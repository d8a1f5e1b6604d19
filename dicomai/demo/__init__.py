"""Real radiographs, wrapped as DICOM, for the demonstration and the tests."""
