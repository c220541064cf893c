"""What the Makefile runs: set-up, and the lock that it installs from."""
