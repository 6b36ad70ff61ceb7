"""What a layer becomes: mix-ins that borrow a live layer's state and own none, and the exchange of a layer's class.

Also the table of ops, and what says a line, for the rooms above that may not look past this one.
"""

from ds_fused.ops.common._say import say
from ds_fused.ops.registry import NEEDS, OPS, Option, switched

__all__ = ["NEEDS", "OPS", "Option", "say", "switched"]
