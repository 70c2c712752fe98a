"""The Hugging Face Hub: models by name, circuits and adapters that people share."""
