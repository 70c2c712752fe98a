"""Evaluation: does a circuit do what it claims, beside its competitors and controls."""
