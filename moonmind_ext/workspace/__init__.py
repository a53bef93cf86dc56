"""Sending a workspace into an engine, and bringing its changes back."""
