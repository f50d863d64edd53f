"""Measurements that anyone can repeat; not part of the tests, and not installed."""
