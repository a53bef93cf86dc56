"""The worker: jobs of MoonMind's queue through the pipeline and back.

Imports nothing, so that the command line starts fast.
"""
