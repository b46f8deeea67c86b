"""Sandboxes on E2B: its cloud, a self-hosted E2B, or the gateway of another Sandgate. The only package that knows E2B's SDK.

The SDK is loaded at the first use. Every call carries its own key and addresses, so that several aliases live side by
side and nothing is read from the environment. The SDK's connections belong to no event loop.
"""

from executions.backends.e2b.backend import E2BBackend

__all__ = ["E2BBackend"]
