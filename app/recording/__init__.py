"""What is measured during a run, and the file that holds it."""
