"""Training of models whose tables are compressed: `torchrun -m training`."""
