"""Preference losses: what they receive (pairs), how they are registered (registry) and found (lookup), and the losses
themselves, a module per family: logistic, margin, unpaired, reference_free."""

STOCK_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")  # LLaMA-Factory's own
