"""Benchmarks that anyone can repeat. They are not part of the tests, and not installed."""
