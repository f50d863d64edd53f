"""The machinery of every command, whatever it trains: run folders, states, checkpoint files, locks, signals, launch,
precision, optimiser, finite guard, seeds, console, errors."""
