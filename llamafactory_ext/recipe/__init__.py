"""A recipe: the plugin's YAML keys, how `llamafactory-cli train` reads it, and its tokenizer and pairs."""
