#!/usr/bin/env python
"""Every command of Sandgate: `python manage.py help`."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError:
        sys.exit("Django is not installed in this Python. Type: make run   (or: pip install -r requirements.txt)")
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
