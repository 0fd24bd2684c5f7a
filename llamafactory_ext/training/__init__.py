"""What happens in a training: the trainer, log-probabilities, shared prefixes, the refinement term, monitors."""
