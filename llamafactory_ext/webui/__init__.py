"""LLaMA Board: the plugin's losses, their settings, and live reward curves."""
