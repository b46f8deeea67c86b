"""What may be installed: one decision, one sentence, the same at every door."""

from __future__ import annotations

import re

from executions.errors import Invalid, PackageDenied
from executions.models import Agent

# A name, extras, and plain version specifiers: never a URL, a path, an option or a marker.
REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"(?:\[[A-Za-z0-9._, -]*\])?"
    r"\s*(?:(?:==|!=|<=|>=|<|>|~=)\s*[A-Za-z0-9.*+!_-]+\s*,?\s*)*$"
)


def name_of(requirement: str) -> str:
    """The normalised name of a requirement such as `emoji>=2`. Raises Invalid for anything that is more than that."""
    found = REQUIREMENT.match(requirement.strip())
    if found is None:
        raise Invalid(
            f"packages: {requirement[:80]!r} is not a package name with plain version specifiers.", field="packages"
        )
    return re.sub(r"[-_.]+", "-", found["name"]).lower()


def decide(agent: Agent, requirement: str) -> str:
    """The sentence why the agent may install it. Raises PackageDenied; an empty list means none."""
    name = name_of(requirement)
    allowed = {re.sub(r"[-_.]+", "-", str(p)).lower() for p in agent.packages}
    if "*" in allowed:
        return f"agent {agent.name} may install any package"
    if name in allowed:
        return f"{name} is on the list of agent {agent.name}"
    listed = ", ".join(sorted(allowed)) or "none"
    raise PackageDenied(f"Agent {agent.name} may not install {name}; allowed are: {listed}.", package=name)
