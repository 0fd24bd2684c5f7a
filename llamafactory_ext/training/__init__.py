"""Training: the trainer, log-probabilities, shared prefixes, the refinement term, monitors."""
