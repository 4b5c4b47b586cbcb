"""Who runs in the next step: requests, their queue, and the scheduler. No clock, no randomness, no I/O."""
