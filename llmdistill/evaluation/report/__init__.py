"""The contents of the report, with one module per kind: measured figures in, values for the templates out."""
