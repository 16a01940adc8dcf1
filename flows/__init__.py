"""Prefect flows and the command line: calls and loops, no arithmetic."""
