"""Discovery: packs of prompts run through the layers, streaming sums, runs that survive crashes, and circuits."""
