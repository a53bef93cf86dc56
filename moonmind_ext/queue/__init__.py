"""A stand-in of MoonMind's queue server, for local work and tests."""
