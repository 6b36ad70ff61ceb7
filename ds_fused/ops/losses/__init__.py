"""Losses of logits that are there."""
