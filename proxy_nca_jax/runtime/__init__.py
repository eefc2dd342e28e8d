"""Running on a machine: workdirs, locks, processes, signals, logs, errors."""
