"""What people look at: the report of a selection."""

from gradmimic_jax.reporting.page import report

__all__ = ["report"]
