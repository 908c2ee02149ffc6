"""Import me in a verl process to patch it and to add our policy losses to its registry, in the driver and in every worker:

    VERL_USE_EXTERNAL_MODULES=rlhf_fast.integrations.verl_plugin      or      VERL_USE_EXTERNAL_PLUGINS=rlhf_fast

verl imports every installed plug-in unless VERL_USE_EXTERNAL_PLUGINS says otherwise. An installed package alone must not change
what a framework computes, so an import that nobody asked for does nothing.
"""

from __future__ import annotations

import os

from rlhf_fast.integrations import patch
from rlhf_fast.integrations.verl_losses import register_policy_losses


def _asked_for() -> bool:
    named = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "") + "," + os.environ.get("VERL_USE_EXTERNAL_MODULES", "")
    return bool({"rlhf_fast", __name__} & {name.strip() for name in named.split(",")})


if _asked_for():
    patch("verl", quiet=True)
    register_policy_losses()
