"""What a recipe will take on given GPUs: steps, tokens, and memory by part."""
