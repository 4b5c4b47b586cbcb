"""Real runs on the machine at hand against their predictions: `pagedkv reality`."""
