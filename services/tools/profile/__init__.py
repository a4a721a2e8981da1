"""`make profile`: where the time of an engine's steps goes."""
