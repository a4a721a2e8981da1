"""Answers in redis-cache: what they are called, and the header that says whether one was used."""

HEADER = b"x-owngpt-cache"
HIT, MISS, BYPASS = b"hit", b"miss", b"bypass"
PREFIX = "answer:"
