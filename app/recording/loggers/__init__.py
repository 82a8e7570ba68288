"""Live curves elsewhere: what a run hands to other programs while it goes on (docs/loggers.md)."""
