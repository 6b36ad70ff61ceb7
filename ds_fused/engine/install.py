"""``ds_fused.install()``: what the plug-in entry point does at ``import torch``, said explicitly."""

from __future__ import annotations

from ds_fused import autoload


def install() -> None:
    """Make ``deepspeed.initialize`` honour the ``ds_fused`` block of its config in this process.

    Needed only where the entry point is switched off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``) or the package is not
    installed but found on ``sys.path``. Call it before ``deepspeed.initialize``; before or after the imports is equal.
    """
    autoload.register()
