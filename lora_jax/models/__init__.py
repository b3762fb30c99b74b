"""The decoder that the command line fine-tunes, and how it generates text."""
