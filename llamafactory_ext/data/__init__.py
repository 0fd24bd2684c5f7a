"""Preference data: pairs made from other data, and the checks before a training."""
