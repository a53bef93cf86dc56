"""Sessions with an engine. Imports nothing, so that the command line starts fast."""
