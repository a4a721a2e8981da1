"""`python -m services.jobs --port N`: serve the jobs service."""

from common.serving import serve

if __name__ == "__main__":
    serve("jobs", "Files, fine-tuning jobs and batches.")
