"""Whose caches are whose: what one tenant computed must tell another nothing, not even by its speed.

Every request belongs to a cache scope: its key, a scope that keys were given on purpose (`keys create --scope`), or
everybody (CACHE_SCOPE=all). The scope is part of an answer's name, and the worker puts the scope's salt into the
request, where vLLM makes it part of every KV block's hash (`cache_salt`). Salts are keyed, so nobody can guess one.
Attack: Gu et al. 2025, "Auditing prompt caching in language model APIs", https://arxiv.org/abs/2502.07776.
"""

from hashlib import blake2b
from typing import Literal

from common.keys import ApiKey


class Scopes:
    """The cache scopes of one deployment."""

    def __init__(self, secret: str, shared: Literal["key", "all"]) -> None:
        self._secret = blake2b(secret.encode(), digest_size=32, person=b"owngpt scope v1").digest()
        self._shared = shared
        self._salts: dict[str, str] = {}

    def of(self, key: ApiKey) -> str:
        """The scope of a key."""
        if self._shared == "all":
            return "all"
        return f"scope {key.scope}" if key.scope else f"key {key.id}"

    def salt(self, scope: str) -> str:
        """The scope's salt, 32 hex digits. A deployment has few scopes, so all are remembered."""
        salt = self._salts.get(scope)
        if salt is None:
            salt = self._salts[scope] = blake2b(scope.encode(), digest_size=16, key=self._secret).hexdigest()
        return salt
