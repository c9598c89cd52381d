"""The coordinator: rounds, aggregation, checkpoints, and simulation on one machine."""
