"""Plan, stream, verify: the merge itself."""
