"""The E2B backend keeps the contract of backends, by E2B's own SDK over a real socket, on the product's gateway."""

from __future__ import annotations

import os

import pytest

from executions.backends.e2b import E2BBackend
from tests.backends.contract import BackendContract
from tests.product import Product


def on_gateway(product: Product) -> E2BBackend:
    """An alias whose E2B is the product that runs: the one double there is."""
    url = f"{product.url}/e2b"
    options = {"API_KEY": product.key, "API_URL": url, "SANDBOX_URL": url, "LANGUAGES": ["python", "bash"]}
    return E2BBackend("double", {**options, "ISOLATION": "namespaces"})


class TestE2B(BackendContract):
    template = "code-interpreter-v1"

    @pytest.fixture
    def backend(self, product: Product) -> E2BBackend:
        return on_gateway(product)
