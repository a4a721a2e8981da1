"""The two redis servers: every name, every script, how to connect."""
