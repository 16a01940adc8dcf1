"""Kills at random moments of a real run: S3 server, Prefect server, Ray cluster of several nodes, all of them real."""
