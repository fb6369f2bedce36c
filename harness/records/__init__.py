"""What a run writes: its folder, logs, results and report."""
