"""Which layer becomes what: the table of families, and one walker that plans, proves, commits, reports and restores."""

from ds_fused.policies.plan import apply
from ds_fused.policies.report import restore

__all__ = ["apply", "restore"]
