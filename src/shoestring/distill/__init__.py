"""Distillation: a student network learns from a frozen teacher's outputs and features."""
