"""Memory and communication of a step on many devices."""
