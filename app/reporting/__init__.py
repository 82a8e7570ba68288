"""What is drawn and told of recorded runs: reads metrics.h5, writes figures and a page."""
