"""The copy of a run in an object store, and shards that workers without a common disk make."""
