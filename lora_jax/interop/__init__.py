"""Other formats: Hugging Face weights, GGUF, tokenizers, and the files the main job fetches."""
