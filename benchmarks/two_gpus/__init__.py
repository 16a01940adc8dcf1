"""One GPU against two under Ray: speed of the stages, whether their results are the same, and where the time goes."""
