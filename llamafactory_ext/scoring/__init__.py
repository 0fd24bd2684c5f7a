"""Pairs scored offline, by any model against any reference."""
