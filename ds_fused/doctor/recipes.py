"""What single model types need beyond ``shrink``, so that they can be built tiny. Data: a type is one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# model type -> changes of its shrunk configuration
CHANGES: Mapping[str, Mapping[str, Any]] = {}
