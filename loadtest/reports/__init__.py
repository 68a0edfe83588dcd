"""What a load run came to: figures, verdicts, plots and comparisons, all made from the run's records alone."""
