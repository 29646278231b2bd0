"""Tasks, protocols and tracks that ship with the suite, as data files."""
