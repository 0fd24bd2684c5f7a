"""A recipe: the plugin's YAML keys, reading it as `llamafactory-cli train` does, and loading its tokenizer and pairs."""
