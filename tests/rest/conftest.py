from tests.plane.conftest import behave, caller, scripted, seeded

__all__ = ["behave", "caller", "scripted", "seeded"]
