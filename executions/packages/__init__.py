"""What may be installed and how it gets here: one decision in one sentence, one store, the same at every door."""

from executions.packages.decide import Decision, Item, decide, outlook, rules_of
from executions.packages.names import name_of, requirements_of

__all__ = ["Decision", "Item", "decide", "name_of", "outlook", "requirements_of", "rules_of"]
