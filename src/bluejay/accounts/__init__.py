"""Who may use a server, and what they took: projects, keys, plans, the usage ledger; flagged generations.

keys.py      a key's text, prefix and digest
plans.py     what a project may ask for
records.py   frozen records that travel between rooms
store.py     every query; database.py: connections and migrations; tables.py
ledger.py    usage on its way into the store, in a journal that survives a killed server and an absent database
"""
