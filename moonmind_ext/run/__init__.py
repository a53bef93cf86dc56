"""One run of one task, from its payload to its files."""
