"""The parts of `prompts`: sources, templates, and the steps in which the teacher makes prompts from prompts."""
