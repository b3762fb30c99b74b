"""What fine-tuning takes, before anything is loaded or rented."""
