"""The gate: does a candidate keep what a baseline can do? Pass, fail, or not decided yet."""
