"""What people look at: the report of a selection, and figures of a run."""

from gradmimic_jax.reporting.page import report

__all__ = ["report"]
