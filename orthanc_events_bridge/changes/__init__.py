"""What Orthanc says happened: its change log, its callbacks, and the two merged. Standard library only."""
