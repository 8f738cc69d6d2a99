"""Samplers and what surrounds them."""
