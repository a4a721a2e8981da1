"""Checks training files without a tokenizer: `python -m services.jobs.check TRAINING [VALIDATION]`.

Prints one JSON object: {"problems": [{"param", "line", "path", "code", "message"}], "summary", "warnings"}.
A process of its own: half a gigabyte of JSON would hold up whoever else lives in this one. It keeps no example, only
fingerprints.
"""

import json
import resource
import sys
from dataclasses import asdict

from common import dataset

MAX_SHOWN = 20
MAX_MEMORY_BYTES = 1024**3
"""Of address space: what no file comes near; one that does ends its check, not the service."""


def check(training_path: str, validation_path: str | None) -> dict[str, object]:
    """Everything that is wrong with the files, and what is odd."""
    with open(training_path, "rb") as lines:
        training = dataset.read(dataset.open_lines(lines), keep=False)
    found = [("training_file", problem) for problem in training.problems]
    warnings = []
    if training.duplicates:
        shown = ", ".join(f"line {a} = line {b}" for a, b in training.duplicates[:MAX_SHOWN])
        warnings.append(f"training_file: {training.repeated} rows say the same as an earlier one: {shown}")
    if validation_path:
        with open(validation_path, "rb") as lines:
            validation = dataset.read(dataset.open_lines(lines), min_examples=1, keep=False)
        found += [("validation_file", problem) for problem in validation.problems]
        if shared := dataset.overlap(training, validation):
            shown = ", ".join(f"line {a} = training line {b}" for a, b in shared[:MAX_SHOWN])
            warnings.append(
                f"validation_file: {len(shared)} rows are also in the training file, so the validation loss "
                f"says too little: {shown}"
            )
    return {
        "problems": [{"param": param} | asdict(problem) for param, problem in found],
        "summary": dataset.summary([problem for _, problem in found]) if found else "",
        "warnings": warnings,
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    print(json.dumps(check(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)))
