"""Rollouts for Tunix (``pip install 'rootcellar[tunix]'``): docs/rl.md."""

from rootcellar.integrations.tunix.rollout import RootcellarRollout
from rootcellar.integrations.tunix.trees import tensors_of

__all__ = ["RootcellarRollout", "tensors_of"]
