"""Small stand-ins for the frameworks: their module paths, names and signatures, with the formulas in plain PyTorch."""

from integrations.fakes._module import module
from integrations.fakes._openrlhf import openrlhf
from integrations.fakes._slime import slime
from integrations.fakes._trl import old_trl, trl
from integrations.fakes._verl import VerlConfig, verl

__all__ = ["MAKERS", "VerlConfig", "module", "old_trl", "openrlhf", "trl", "verl"]

MAKERS = {"trl": trl, "verl": verl, "openrlhf": openrlhf, "slime": slime}
