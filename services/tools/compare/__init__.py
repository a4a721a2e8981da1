"""`make compare`: the same load against several engines, side by side."""
