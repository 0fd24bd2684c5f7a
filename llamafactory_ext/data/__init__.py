"""Preference data: makes pairs from other data sets, and checks a recipe's pairs before training."""
