"""The global router: what queries ask for and experts do, in words and vectors."""
