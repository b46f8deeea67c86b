"""Settings, read once from the environment or `.env`; what each means stands in docs/configuration.md."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from ipaddress import ip_network
from pathlib import Path

import environ
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent
MISTAKES: list[str] = []  # all of them are told together, at the end


class Env(environ.FileAwareEnv):
    """X_FILE=path works for every X; what cannot be read is noted, and the default stands in."""

    def get_value(self, var, cast=None, default=environ.Env.NOTSET, parse_default=False):
        try:
            return super().get_value(var, cast=cast, default=default, parse_default=parse_default)
        except (ValueError, OSError, ImproperlyConfigured):
            said = f"{var}: {os.environ[var]!r} is not" if var in os.environ else f"{var}_FILE: the file does not hold"
            MISTAKES.append(f"{said} {'a number' if cast is int else 'a value that can be read'}.")
            return default


env = Env()
if (BASE_DIR / ".env").is_file():
    env.read_env(str(BASE_DIR / ".env"))

DATA = Path(env.str("SANDGATE_DATA", default="") or BASE_DIR / "var").absolute()


def kept(name: str, made: str) -> str:
    """What was made for this installation at its first start, readable by its owner only."""
    path, mine = DATA / name, DATA / f".{name}-{os.getpid()}"
    try:
        DATA.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
                f.write(made)
            try:
                os.link(mine, path)  # whole or not at all, and of several processes one makes it
            except FileExistsError:
                pass
            finally:
                mine.unlink()
        return path.read_text().strip()
    except OSError as e:
        sys.exit(
            f"The data folder {DATA} cannot be written ({e.strerror}). "
            "Free some space or give it to this user, or name another: export SANDGATE_DATA=/path"
        )


DEBUG = env.bool("SANDGATE_DEBUG", default=False)
SECRET_KEY = env.str("SECRET_KEY", default="") or kept("secret_key", secrets.token_urlsafe(48))
PORT = env.int("PORT", default=8000)
BIND = env.str("SANDGATE_BIND", default="127.0.0.1")
PUBLIC_URL = env.str("SANDGATE_PUBLIC_URL", default=f"http://127.0.0.1:{PORT}").rstrip("/")
_public_host = PUBLIC_URL.split("://", 1)[-1].split("/")[0].rsplit(":", 1)[0]
ALLOWED_HOSTS = env.list("SANDGATE_ALLOWED_HOSTS", default=["127.0.0.1", "localhost", "[::1]", _public_host])
CSRF_TRUSTED_ORIGINS = [PUBLIC_URL]
HTTPS = PUBLIC_URL.startswith("https://")

INSTALLED_APPS = [
    "executions.apps.ExecutionsConfig",  # first: its runserver starts the node too
    "daphne",
    "unfold",
    "unfold.contrib.filters",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "rest_framework",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
]

# Sessions, CSRF and the like are for people: these skip what programs call (config/middleware.py).
MIDDLEWARE = [
    "config.middleware.request_id",
    "config.middleware.Security",
    "config.middleware.Session",
    "config.middleware.Common",
    "config.middleware.Csrf",
    "config.middleware.Authentication",
    "config.middleware.Messages",
    "config.middleware.FrameOptions",
    "config.middleware.ContentPolicy",
]
PROGRAM_PATHS = ("/api/v1/", "/mcp", "/e2b", "/healthz", "/readyz", "/metrics")

ROOT_URLCONF = "config.urls"
ASGI_APPLICATION = "config.asgi.application"
AUTH_USER_MODEL = "executions.User"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
LOGIN_URL = "/sign-in"
LOGIN_REDIRECT_URL = "/"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
            "libraries": {"console": "executions.console.tags", "show": "executions.admin.tags"},
        },
    }
]

# The machine among those that share a database: its local sandboxes are its own.
NODE = env.str("SANDGATE_NODE", default="") or kept("node_name", f"{socket.gethostname()[:40]}-{secrets.token_hex(2)}")
if len(NODE) > 60 or not NODE.isprintable():
    MISTAKES.append("SANDGATE_NODE: at most 60 printable characters.")

HOP_THREADS = env.int("SANDGATE_HOP_THREADS", default=4)
HOP_INLINE = False

DATABASES = {"default": env.db_url("DATABASE_URL", default=f"sqlite:///{DATA / 'sandgate.sqlite3'}")}
_database = DATABASES["default"]
_engine = _database.get("ENGINE", "")
if _engine.endswith("sqlite3"):
    _database["CONN_MAX_AGE"] = None
    _database["OPTIONS"] = {
        "transaction_mode": "IMMEDIATE",  # otherwise two admissions read the same count and both pass
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-20000;",
    }
elif _engine.endswith("postgresql"):
    _database["CONN_MAX_AGE"] = 0
    _database["OPTIONS"] = {**_database.get("OPTIONS", {}), "pool": {"min_size": 2, "max_size": HOP_THREADS + 8}}
else:
    MISTAKES.append("DATABASE_URL: sqlite:///path and postgresql://user:password@host/name are known.")

REDIS_URL = env.str("REDIS_URL", default="")
if REDIS_URL:
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    # Without it all goes on, so nobody waits for it: one more try at once, where redis-py has ten with seconds between
    _patience = {"socket_timeout": 1, "socket_connect_timeout": 1}
    _host = {"address": REDIS_URL, "retry": AsyncRetry(NoBackoff(), 1), **_patience}
    _cache = {"retry": Retry(NoBackoff(), 1), **_patience}
    CHANNEL_LAYERS = {
        "default": {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer", "CONFIG": {"hosts": [_host]}}
    }
    CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.redis.RedisCache",
            "LOCATION": REDIS_URL,
            "OPTIONS": _cache,
        }
    }
else:
    CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}

# Where sandboxes come from; the order is the default route.
E2B_API_KEY = env.str("E2B_API_KEY", default="")
GATEWAY_DOMAIN = env.str("SANDGATE_E2B_DOMAIN", default="").lower()  # its api.* and *.* lead here
TEMPLATE_PYTHON = env.str("SANDGATE_TEMPLATE_PYTHON", default="")  # else var/templates/<hash>/bin/python
SANDBOXES: dict[str, dict] = {}
if E2B_API_KEY:
    SANDBOXES["e2b"] = {
        "BACKEND": "executions.backends.e2b.E2BBackend",
        "OPTIONS": {
            "API_KEY": E2B_API_KEY,
            "DOMAIN": env.str("E2B_DOMAIN", default=""),
            "API_URL": env.str("E2B_API_URL", default=""),
            "SANDBOX_URL": env.str("E2B_SANDBOX_URL", default=""),
            "CREATIONS_PER_SECOND": env.float("SANDGATE_E2B_CREATIONS_PER_SECOND", default=0),
            "CONCURRENCY": env.int("SANDGATE_E2B_CONCURRENCY", default=0),
            "REMOTE": env.bool("SANDGATE_E2B_REMOTE", default=True),
        },
    }
ISOLATION_FLOOR = env.str("SANDGATE_ISOLATION_FLOOR", default="namespaces")
if ISOLATION_FLOOR not in ("none", "reduced", "namespaces", "microvm"):
    MISTAKES.append(f"SANDGATE_ISOLATION_FLOOR: {ISOLATION_FLOOR!r} is none of none, reduced, namespaces, microvm.")
SANDBOXES["local"] = {
    "BACKEND": "executions.backends.local.LocalBackend",
    "OPTIONS": {"RUN_DIR": str(DATA / "node"), "FLOOR": ISOLATION_FLOOR},
}
if env.bool("SANDGATE_SCRIPTED", default=False):
    SANDBOXES["scripted"] = {"BACKEND": "executions.backends.scripted.ScriptedBackend", "OPTIONS": {}}

CODE_MAX_BYTES = 1_000_000
FILE_MAX_BYTES = env.int("SANDGATE_FILE_MAX_BYTES", default=256 * 1024 * 1024)
EXECUTION_TIMEOUT_MAX_SECONDS = env.int("SANDGATE_TIMEOUT_MAX_SECONDS", default=3600)
# OAuth for MCP clients of people: nothing of it is there unless it is switched on.
OAUTH = env.bool("SANDGATE_OAUTH", default=False)
IDP_OIDC_DCR_ENABLED = env.bool("SANDGATE_OAUTH_REGISTRATION", default=False)
if OAUTH:
    if not HTTPS and _public_host not in ("127.0.0.1", "localhost", "[::1]"):
        MISTAKES.append("SANDGATE_OAUTH: tokens need https: SANDGATE_PUBLIC_URL=https://… (or a loopback address).")
    INSTALLED_APPS += ["allauth", "allauth.account", "allauth.idp.oidc"]
    MIDDLEWARE += ["allauth.account.middleware.AccountMiddleware"]
    IDP_OIDC_ADAPTER = "executions.mcp.authorization.Adapter"
    IDP_OIDC_DCR_REQUIRES_INITIAL_ACCESS_TOKEN = False
    IDP_OIDC_REFRESH_TOKEN_EXPIRES_IN = 30 * 24 * 3600
    IDP_OIDC_RATE_LIMITS = {"client_registration": "20/m/ip"}
    ACCOUNT_EMAIL_VERIFICATION = "none"

MCP_ANSWER_SECONDS = 45.0  # a tool call has answered by then: clients give up at 60
MCP_PROGRESS_SECONDS = 2.0  # between two words about progress, where the client asked for them
HEARTBEAT_SECONDS = 5  # a runner that has not been heard of for three of these is dead
BACKGROUND_SECONDS = 2.0  # how often the background loop looks
QUEUE_SECONDS = env.int("SANDGATE_QUEUE_SECONDS", default=60)  # for which a request waits when a backend's plan is full
QUEUE_LENGTH = env.int("SANDGATE_QUEUE_LENGTH", default=1000)  # requests that may wait at a time
RATE_CEILING_NANO_USD_PER_SECOND = env.int("SANDGATE_RATE_CEILING_NANO_USD_PER_SECOND", default=100_000)
DATA_UPLOAD_MAX_MEMORY_SIZE = 8 * 1024 * 1024  # files do not come this way: they are streamed

SESSION_PAUSE_AFTER_SECONDS = env.int("SANDGATE_PAUSE_AFTER_SECONDS", default=120)
PACKAGE_INDEX = env.str("SANDGATE_PACKAGE_INDEX", default="")  # else what this machine's uv knows
PACKAGE_INDEX_PRIVATE = env.str("SANDGATE_PACKAGE_INDEX_PRIVATE", default="")
ARTIFACTS_DIR: str = env.str("SANDGATE_ARTIFACTS", default=str(DATA / "artifacts"))
ARTIFACT_DAYS = env.int("SANDGATE_ARTIFACT_DAYS", default=30)
ARTIFACTS_MAX_FILES = env.int("SANDGATE_ARTIFACTS_MAX_FILES", default=100)  # of one sandbox
ARTIFACTS_MAX_BYTES = env.int("SANDGATE_ARTIFACTS_MAX_BYTES", default=256 * 1024 * 1024)  # of one sandbox
ARTIFACTS_TOTAL_BYTES = env.int("SANDGATE_ARTIFACTS_TOTAL_BYTES", default=10 * 1024**3)
KEEP_GRACE_SECONDS = 20  # beyond its end, for which a sandbox whose files are kept is paid, too

WEBHOOK_NETWORKS = env.list("SANDGATE_WEBHOOK_NETWORKS", default=[])  # told although they are not public
try:
    WEBHOOK_NETWORKS = [str(ip_network(text.strip())) for text in WEBHOOK_NETWORKS]
except ValueError as problem:
    MISTAKES.append(f"SANDGATE_WEBHOOK_NETWORKS: {problem}.")
    WEBHOOK_NETWORKS = []

METRICS_TOKEN = env.str("SANDGATE_METRICS_TOKEN", default="")
if 0 < len(METRICS_TOKEN) < 16:
    MISTAKES.append("SANDGATE_METRICS_TOKEN: shorter than 16 characters; openssl rand -hex 24 makes one.")

LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False
DATE_FORMAT, DATETIME_FORMAT = "Y-m-d", "Y-m-d H:i:s"

STATIC_URL = "/static/"
STATIC_ROOT = DATA / "static"
STATICFILES_DIRS = [(name, BASE_DIR / "static" / name) for name in ("console", "admin")]  # the sources are not served

SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = HTTPS
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = HTTPS
SECURE_REFERRER_POLICY = "same-origin"
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if HTTPS else None
X_FRAME_OPTIONS = "DENY"
SILENCED_SYSTEM_CHECKS = ["security.W001", "security.W002", "security.W003"]  # config.middleware has them, subclassed
if not HTTPS:
    SILENCED_SYSTEM_CHECKS += ["security.W004", "security.W008", "security.W012", "security.W016"]

CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": ["'self'"],
        "style-src": ["'self'"],
        "img-src": ["'self'", "data:", "blob:"],
        "font-src": ["'self'"],
        "connect-src": ["'self'"],
        "frame-src": ["'self'", "blob:"],
        "form-action": ["'self'"],
        "base-uri": ["'none'"],
        "frame-ancestors": ["'none'"],
    }
}
ADMIN_CONTENT_SECURITY_POLICY = {  # Unfold's Alpine needs eval and inline styles
    **CONTENT_SECURITY_POLICY["DIRECTIVES"],
    "script-src": ["'self'", "'unsafe-eval'", "'unsafe-inline'"],
    "style-src": ["'self'", "'unsafe-inline'"],
}

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["executions.api.auth.KeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["executions.api.auth.HasScope"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_PAGINATION_CLASS": "executions.api.pages.Pages",
    "DEFAULT_FILTER_BACKENDS": ["django_filters.rest_framework.DjangoFilterBackend"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "executions.api.problems.handler",
    "UNAUTHENTICATED_USER": None,
    "PAGE_SIZE": 50,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Sandgate",
    "DESCRIPTION": "Run the code that agents write: on E2B, or on the local runtime.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.0",
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": [],
    "SERVE_AUTHENTICATION": [],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
}

LOG_FORMAT = env.str("SANDGATE_LOG_FORMAT", default="console" if sys.stderr.isatty() else "json")
LOG_LEVEL = env.str("SANDGATE_LOG_LEVEL", default="INFO")
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "config.logs.formatter", "style": LOG_FORMAT}},
    "filters": {"meant": {"()": "config.logs.Meant"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {
        "django.request": {"level": "ERROR"},
        "uvicorn.access": {"level": "WARNING"},
        "uvicorn.error": {"filters": ["meant"]},
        "daphne": {"level": "WARNING"},
        "e2b": {"level": "INFO"},  # these two log submitted code at DEBUG
        "e2b_code_interpreter": {"level": "INFO"},
        "pyqwest": {"level": "INFO"},
        "httpx": {"level": "WARNING"},
        "httpx2": {"level": "WARNING"},
        "httpcore": {"level": "WARNING"},
        "mcp": {"level": "WARNING"},
    },
}

UNFOLD = {
    "SITE_TITLE": "Sandgate",
    "SITE_HEADER": "Sandgate",
    "SITE_SUBHEADER": "for operators",
    "SITE_URL": "/",
    "SITE_ICON": "executions.admin.navigation.icon",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": "executions.admin.navigation.icon"}],
    "SHOW_HISTORY": False,
    "DASHBOARD_CALLBACK": "executions.admin.first_page.first_page",
    "STYLES": ["executions.admin.navigation.stylesheet"],
    "SIDEBAR": {"command_search": True, "navigation": "executions.admin.navigation.sidebar"},
    "COMMAND": {
        "search_models": [
            "executions.agent",
            "executions.apikey",
            "executions.team",
            "executions.template",
            "executions.user",
        ],
        "search_callback": "executions.admin.navigation.find",
    },
    "BORDER_RADIUS": "6px",
    "COLORS": {
        "primary": {  # indigo
            "50": "#eef2ff",
            "100": "#e0e7ff",
            "200": "#c7d2fe",
            "300": "#a5b4fc",
            "400": "#818cf8",
            "500": "#6366f1",
            "600": "#4f46e5",
            "700": "#4338ca",
            "800": "#3730a3",
            "900": "#312e81",
            "950": "#1e1b4b",
        },
    },
}

if MISTAKES:
    sys.exit("\n".join(["Sandgate cannot start with these settings (docs/configuration.md):", *MISTAKES]))
