"""Reports as one HTML page each that needs no network and no other file."""
