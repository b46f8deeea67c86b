"""The same node as the contract's, and the words of the attacks."""

from tests.backends.conftest import node

__all__ = ["node"]
