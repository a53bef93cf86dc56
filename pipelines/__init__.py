"""What runs in an engine: MoonMind's container tasks as Dagger pipelines."""
