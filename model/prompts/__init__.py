"""Prompts: files of them, a run's prompts on file, and the columns that count them."""
