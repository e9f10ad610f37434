"""Image-text pairs: drawn in memory, or read from shards."""
