"""Tests that share one running `make up` with one real worker."""
