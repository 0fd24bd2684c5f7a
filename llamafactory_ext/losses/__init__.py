"""Preference losses: functions from `PairLogps` to one value per pair, shape `(batch,)`.

pairs holds their input, registry registers them, lookup finds them by name, objective sums them up; the losses
themselves are in one module per family: logistic, margin, distributional, unpaired, reference_free. divergence has what
may take the place of the log-ratio.
"""

STOCK_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")  # LLaMA-Factory's own
