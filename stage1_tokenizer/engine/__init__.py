"""The machinery of every command, whatever it trains: run folders, states, weights files, locks, signals, launch,
precision, optimizer, finite guard, seeds, console, errors.

Nothing here imports a data set, a network, a bottleneck or a diagnostic."""
