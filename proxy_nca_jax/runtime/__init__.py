"""What a run needs of its machine: workdir, processes, signals, log, errors."""
