"""Real servers, DICOM data and the ledger: for tests, demo, benchmarks, and for users' own tests."""
