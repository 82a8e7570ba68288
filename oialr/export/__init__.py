"""A trained network out of the library: files that others read."""
