"""The run folder: the files of a run, written so that a crash leaves them consistent.

folder       creation, resumption, commits of checkpoints, logs
saver        commits checkpoints that are due; failed ones are retried
find         finds the checkpoint and the recipe behind a path
provenance   commit, command, machine and versions of a run
rollout_log  every completion with its verdict, one Parquet file per step
"""
