"""Tasks: what a batch's losses are, as the library wants them."""
