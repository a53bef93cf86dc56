"""Who asks for a pipeline, and what becomes of its result."""
