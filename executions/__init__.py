"""Sandgate: the management plane for code that AI agents write."""
