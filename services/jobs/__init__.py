"""Everything that takes longer than a request: files, fine-tuning jobs, tuned models, batches. OpenAI's own API."""
