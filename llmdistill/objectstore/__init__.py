"""The copy of a run in an object store, and shards made by workers without a shared disk."""
