"""What the gateway tells a worker of a request."""


CONTEXT = b"x-owngpt-context"
"""Header from the gateway: `{key id} {attempt} {salt} {µs it took to choose}`; the salt is the key's cache scope's."""
TRACEPARENT = b"traceparent"
"""W3C Trace Context: `00-{trace id}-{span id}-{flags}`; there when the gateway traces."""
