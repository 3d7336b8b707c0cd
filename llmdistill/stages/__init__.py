"""The stages: each reads directories, writes one, and is a command of its own."""
