"""Everything HTTP: one server that speaks every dialect in which GPT-J was ever served."""
