"""Configs: `get_config(arg)` functions that return locked ConfigDicts."""
