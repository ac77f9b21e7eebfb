"""Runs that survive: whether ranks live and get on, judged by a process beside them. Nothing here imports torch."""
