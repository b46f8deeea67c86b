"""A double of E2B that tells the truth about a cloud: it is late, refuses, loses and charges. For tests and drills; nothing runs in it.

The gateway's side of E2B's protocol in front of the scripted backend, without the product's rows: no database, no quota, no
ledger, so that what it meters is a second opinion. `manage.py fake_e2b` serves it; E2B's SDKs speak to it unmodified.
"""
