"""Which layer becomes what: recognised by what it has, proved, committed, reported, restored."""

from ds_fused.policies.plan import apply
from ds_fused.policies.report import restore

__all__ = ["apply", "restore"]
