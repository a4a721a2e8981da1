"""One folder per container; `local` runs the same programs as plain processes."""
