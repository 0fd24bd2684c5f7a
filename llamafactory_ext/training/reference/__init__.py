"""The reference: its model, its log-probabilities, and their cache on disk."""
