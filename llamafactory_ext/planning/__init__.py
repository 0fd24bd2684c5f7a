"""Plans a recipe on given GPUs before it runs: steps, tokens, and memory by part."""
