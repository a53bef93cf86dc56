"""Measures what this project adds to what it uses, side by side on the same machine.

`python -m benchmarks` writes its figures as JSON, `python -m benchmarks.report` puts
them into docs/performance.md; `make bench` does both.
"""
