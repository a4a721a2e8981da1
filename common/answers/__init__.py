"""Answers that were given before, kept in redis-cache."""
