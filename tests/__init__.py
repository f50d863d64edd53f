"""Tests. A package, so that they share helpers (tests.processes, tests.training) under one name."""
