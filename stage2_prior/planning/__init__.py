"""Costs of a prior before it is trained: operations, memory, seconds on a device."""
