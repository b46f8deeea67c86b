"""The local runtime's node as a unit of its own, one per machine."""

from __future__ import annotations

import os
import sys
from typing import Any

from django.core.management.base import BaseCommand

from executions.management import boot, node


class Command(BaseCommand):
    help = "Run the local runtime's node; it outlives the web. One per machine."

    def add_arguments(self, parser: Any) -> None:
        parser.add_argument("--die-with-parent", action="store_true", help="end when the parent ends")
        parser.add_argument("--prepare", action="store_true", help="make the sandboxes' environment, print it and stop")

    def handle(self, **options: Any) -> None:
        boot.data_folder()
        python = boot.template_python()
        if python is None:
            sys.exit(1)
        if options["prepare"]:
            self.stdout.write(str(python))
            return
        command = node.argv(python, die_with_parent=options["die_with_parent"])
        os.execve(command[0], command, node.scrubbed())
