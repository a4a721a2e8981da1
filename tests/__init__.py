"""Tests: units, the gateway and nginx against scripted workers, the embedded stack, the compose stack."""
