"""What scores look like: figures for people."""
