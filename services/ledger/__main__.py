"""`python -m services.ledger --port N`: serve the ledger."""

from common.serving import serve

if __name__ == "__main__":
    serve("ledger", "Usage, cost and the status of the stack.")
