"""What more than one program uses. Imports itself only; `make check` sees to it."""

VERSION = "0.2"
"""Of the release; the images in compose.yaml and services/*/hardware.yaml are tagged with it (a test compares)."""
