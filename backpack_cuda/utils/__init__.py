"""BackPACK's helper functions, under its import paths."""
