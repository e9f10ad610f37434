"""One run: the step, the loop, the reference and offline scores."""
