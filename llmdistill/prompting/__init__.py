"""What `prompts` is made of: sources, templates, and the steps in which the teacher makes prompts of prompts."""
