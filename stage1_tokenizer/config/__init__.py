"""The typed configuration of all commands: its types, YAML, the command line, and messages about mistakes in either."""
