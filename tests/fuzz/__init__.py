"""Fuzzing of everything that reads bytes from outside: mutated artefacts are read or refused by name, nothing else."""
