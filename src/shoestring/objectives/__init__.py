"""Losses: what turns (network, batch) into a number for each image; one a file, headed by its equations."""
