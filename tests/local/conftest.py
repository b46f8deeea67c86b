"""The same node as the contract's, and the words of the attacks."""

from tests.backends.conftest import node
from tests.plane.conftest import caller, seeded

__all__ = ["caller", "node", "seeded"]
