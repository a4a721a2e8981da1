"""The request path: who may ask, which worker answers, how the bytes get there."""
