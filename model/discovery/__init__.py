"""Discovery: prompts in packs through the layers, sums that stream, runs that survive, circuits."""
