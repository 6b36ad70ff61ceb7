"""Rotary embedding of the heads of q and k, and their norm in the same pass."""
