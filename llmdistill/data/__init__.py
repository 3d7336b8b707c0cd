"""Datasets: rows, shards, soft targets, batches, cards, and the formats of other projects."""
