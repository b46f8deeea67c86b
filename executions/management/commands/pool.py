"""Warm pools from a terminal."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError
from django.utils import timezone

from executions import audit, backends, costs, demand, network, pool
from executions.keys import Caller
from executions.models import Agent, Pool, Team, Template
from executions.states import PoolTarget


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


class Command(BaseCommand):
    help = "Show the warm pools; with a backend, have one there: `pool e2b --target 5`."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("backend", nargs="?", help="an alias, such as e2b; none: show what there is")
        parser.add_argument("--template", default="default")
        parser.add_argument("--memory-mib", type=int, default=0, help="0: as the template has")
        parser.add_argument("--network", default="", help="its network rules, with commas; none: no network")
        parser.add_argument("--packages-of", metavar="AGENT", help="an agent's id: with its package lock, for it alone")
        parser.add_argument("--target", type=int, help="how many are kept ready; of a forecast, the least")
        parser.add_argument("--follows", choices=PoolTarget.values)
        parser.add_argument("--at-most", type=int, help="the most that a forecast keeps ready")
        parser.add_argument("--hours", type=numbers, help="24 numbers with commas, the first from midnight")
        parser.add_argument("--zero-after", type=int, metavar="SECONDS", help="none is kept after so long without use")
        parser.add_argument("--lifetime", type=int, metavar="SECONDS", help="one that nobody took is replaced then")
        parser.add_argument("--budget", metavar="USD", help="what it may cost a day; none: no ceiling of its own")
        parser.add_argument("--off", action="store_true", help="let go of what is ready")

    def handle(self, *, backend: str | None = None, **options: Any) -> None:
        if backend is not None:
            self.change(backend, options)
        self.show()

    def change(self, backend: str, options: dict[str, Any]) -> None:
        if backend not in backends.aliases():
            raise CommandError(f"There is no backend {backend!r}; there are {', '.join(backends.aliases())}.")
        if not Team.objects.exists():
            raise CommandError("Nothing is set up yet: start Sandgate once, then say this again.")
        template = Template.objects.filter(name=options["template"]).first()
        if template is None:
            names = ", ".join(Template.objects.values_list("name", flat=True))
            raise CommandError(f"There is no template {options['template']!r}; there are: {names}.")
        try:
            rules = network.normalised([rule for rule in options["network"].split(",") if rule])
        except ValueError as problem:
            raise CommandError(f"--network: {problem}") from None
        kind = {"backend": backend, "template": template, "memory_mib": options["memory_mib"]}
        if wanted := options["packages_of"]:
            kind["packages_of"] = Agent.objects.filter(pk=wanted).first()
            if kind["packages_of"] is None:
                raise CommandError(f"--packages-of: there is no agent {wanted!r}; its id is on its page.")
        else:
            kind["packages_of"] = None
        found = Pool.objects.filter(**kind, network_allow=rules).first() or Pool(**kind, network_allow=rules)
        said = {
            "target": options["target"],
            "follows": options["follows"],
            "at_most": options["at_most"],
            "zero_after_seconds": options["zero_after"],
            "lifetime_seconds": options["lifetime"],
            "hours": options["hours"],
            "is_enabled": not options["off"],
        }
        changed = {name: value for name, value in said.items() if value is not None}
        for name, value in changed.items():
            setattr(found, name, value)
        try:
            found.full_clean()
            nano_usd = None if options["budget"] in (None, "none") else int(Decimal(options["budget"]) * costs.NANO)
        except ValidationError as e:
            raise CommandError(" ".join(f"{field}: {' '.join(why)}" for field, why in e.message_dict.items())) from None
        except InvalidOperation:
            raise CommandError(f"--budget: {options['budget']!r} is not an amount of dollars.") from None
        found.save()
        account = pool.account(found)
        if options["budget"] is not None:
            pool.allow(found, nano_usd)
        audit.record(
            "pool_changed", caller=Caller(team=account.team, agent=None, door="command"), subject=found.pk,
            after=changed | {"backend": backend, "template": template.name, "packages_of": options["packages_of"] or ""},
        )  # fmt: skip

    def show(self) -> None:
        pools = list(Pool.objects.select_related("template", "packages_of").order_by("backend", "template__name"))
        if not pools:
            self.stdout.write("There is no pool: every sandbox is booted when it is asked for.")
        standings = demand.standings(pools)
        for found in pools:
            now = standings[found.pk]
            rate = "nobody asked in the last hour"
            if now.hit_rate is not None:
                rate = f"{now.hit_rate:.1%} of {now.hits + now.misses} hit"
            packages = f", packages of {found.packages_of.name}" if found.packages_of else ""
            self.stdout.write(
                f"{found}{packages}: {now.ready} ready, {now.booting} booting, {demand.wanted(found, timezone.now())} wanted; "
                f"{rate}; waiting costs {costs.usd(now.idle_nano_usd_per_day)} a day"
                + (f"; {found.trouble}" if found.trouble else "")
            )
