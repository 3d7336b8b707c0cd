"""A whole run: the order of its stages, what is checked before them, its progress, and what is made of several runs."""
