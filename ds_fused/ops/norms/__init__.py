"""Norms of rows and of groups, with the residual, the gate or the modulation beside them."""
