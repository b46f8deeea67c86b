# make run    Sandgate on http://127.0.0.1:8000, from nothing
# make test   all tests, on SQLite and on PostgreSQL
# make lint   style, types, layers, migrations, the committed OpenAPI document
# make bench  measurements of this machine
# make soak   10,000 sandboxes at one node, which must not grow; 200 kills while E2B misbehaves; a dollar that holds; 10,000 calls whose connections are cut; 500 deaths
#             between two steps, on each database; a million executions in the tables
# make test-e2b  the contract of backends on E2B itself: E2B_API_KEY=e2b_… make test-e2b

PYTHON ?= python3
PY = .venv/bin/python

.PHONY: run test test-sqlite test-postgresql test-e2b lint bench soak chromium tools

run:
	@$(PYTHON) deploy/bootstrap.py
	@exec $(PY) manage.py serve

test: test-sqlite test-postgresql

test-sqlite: tools chromium
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-postgresql: tools
	$(PY) -m tests.servers postgresql $(PY) -m pytest -n 2 --dist loadfile -m "database and not product and not browser and not runtime and not long" $(ARGS)

test-e2b: tools
	@[ -n "$(E2B_API_KEY)" ] || { echo "This needs a key of E2B's: E2B_API_KEY=e2b_… make test-e2b"; exit 2; }
	@SANDGATE_TEST_E2B_KEY=$(E2B_API_KEY) SANDGATE_TEST_E2B_DOMAIN=$(E2B_DOMAIN) $(PY) -m pytest tests/backends/test_e2b.py -k Cloud $(ARGS)

lint: tools
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache
	$(PY) manage.py makemigrations --check --dry-run
	$(PY) manage.py openapi --check

bench: tools
	$(PY) -m tests.bench $(ARGS)
	$(PY) -m tests.bench.answers

soak: tools
	$(PY) -m pytest -m long $(ARGS)
	$(PY) -m tests.bench.soak
	$(PY) -m tests.bench.reconcile
	$(PY) -m tests.bench.money
	$(PY) -m tests.bench.retries
	$(PY) -m tests.bench.chaos
	$(PY) -m tests.servers postgresql $(PY) -m tests.bench.chaos
	$(PY) -m tests.bench.million
	$(PY) -m tests.bench.fleet

tools:
	@$(PYTHON) deploy/bootstrap.py tests/requirements.txt

# Debian's own browser, where it may be installed; elsewhere the browser tests say why they are skipped
chromium:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; }
