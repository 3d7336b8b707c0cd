"""Models and tokenizers of Hugging Face, with errors for people."""
