"""The parts of faults.py: programs that can be killed, and what is done to them and their files."""
