"""The stages: each reads directories, writes one, and has its own command."""
