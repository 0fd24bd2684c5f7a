"""The reference: its model, its log-probabilities, and the cache that keeps them between runs."""
