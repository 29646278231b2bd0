"""The conformance kit: what every compression method must hold, checked on tiny models of all families."""
