"""Configs, workdirs, files and devices of jobs; nothing about learning."""
