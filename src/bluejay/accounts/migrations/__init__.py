"""The database's versions, one file each, run by the store when it opens; `env.py` is what Alembic calls."""
