"""`/v1/responses` with state: what was said before is kept in the state redis, the same for every worker."""
