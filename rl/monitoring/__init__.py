"""Monitoring: metrics, progress and checks of a run.

metrics   the numbers of a step
progress  progress display of a terminal or a log
watchdog  ends a process in which nothing has moved for too long
events    events.jsonl: events of batches and workers
checks    completions without scores, inexact rollouts, drift of the policy
"""
