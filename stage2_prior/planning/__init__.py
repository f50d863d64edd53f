"""The costs of a prior before it is trained: operations, memory, and seconds on a device."""
