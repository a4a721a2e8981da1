"""What a run tells the trainer."""

import json
import os


class Events:
    """What a run says, one JSON object a line."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever libraries print is no event

    def say(self, kind: str, **fields: object) -> None:
        """`kind`: message, metrics, checkpoint, resolved, data, rejected, done."""
        self._out.write(json.dumps({"kind": kind, **fields}) + "\n")
