"""Mathematics of one matrix. Pure functions on tensors: nothing here communicates."""
