"""A run: its record, the order of its stages, how far it is, and who may watch."""
