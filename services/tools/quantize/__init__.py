"""`make quantize`: a smaller checkpoint, what it lost and gained, and its entry in models.yaml."""
