"""A run: its record, the order of its stages, its progress, and monitoring."""
