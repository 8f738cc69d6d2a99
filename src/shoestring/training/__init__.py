"""The one training loop and what stands around it: optimisers, averages, checkpoints, tracking, report."""
