"""The command `gradmimic`: from a table of scores to a filter, without Python.

JAX isn't imported here, and the rest only by the part that runs.
"""
