"""Tests. A package, so that they share helpers (tests.helpers.processes, tests.helpers.training) under one name."""
