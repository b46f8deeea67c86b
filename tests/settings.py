"""The product's own settings, in a data folder of this run, deaf to the developer's `.env`.

DATABASE_URL chooses the engine: none is a SQLite file, `python -m tests.servers postgresql …` sets one.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

if "SANDGATE_TEST_DATA" not in os.environ:  # the first process of a run; pytest-xdist's workers inherit the folder
    os.environ["SANDGATE_TEST_DATA"] = tempfile.mkdtemp(prefix="sandgate-tests-")
    atexit.register(shutil.rmtree, os.environ["SANDGATE_TEST_DATA"], ignore_errors=True)
RUN_DATA = Path(os.environ["SANDGATE_TEST_DATA"])
os.environ["SANDGATE_DATA"] = str(RUN_DATA / os.environ.get("PYTEST_XDIST_WORKER", "main"))
Path(os.environ["SANDGATE_DATA"]).mkdir(parents=True, exist_ok=True)
os.environ["SECRET_KEY"] = "for-tests-only-" + "x" * 50
os.environ.setdefault("DATABASE_URL", "")
for name in ("E2B_API_KEY", "E2B_DOMAIN", "E2B_API_URL", "E2B_SANDBOX_URL", "REDIS_URL", "SANDGATE_PUBLIC_URL"):
    os.environ[name] = ""
if not os.environ["DATABASE_URL"]:
    os.environ["DATABASE_URL"] = f"sqlite:///{os.environ['SANDGATE_DATA']}/main.sqlite3"

from config.settings import *  # noqa: E402, F403
from config.settings import DATABASES  # noqa: E402

DATABASES["default"]["TEST"] = {"NAME": f"{os.environ['SANDGATE_DATA']}/test.sqlite3"}  # a file: races need one
if DATABASES["default"]["ENGINE"].endswith("postgresql"):
    DATABASES["default"]["TEST"] = {"NAME": f"test_{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
