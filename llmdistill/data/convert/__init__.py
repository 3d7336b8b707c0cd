"""Datasets in other projects' formats, written and read."""
