"""Prompts: prompt files, the corpus of a run, and the columns that count prompts."""
