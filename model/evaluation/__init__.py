"""Evaluation: whether a circuit does what it claims, compared with competitors and controls."""
