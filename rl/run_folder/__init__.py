"""The run folder: the files of a run, and what a crash leaves of them.

folder       creation, resumption, commits of checkpoints, logs
saver        commits checkpoints that are due; failed ones are retried
find         finds the checkpoint and the recipe behind a path
provenance   commit, command, machine and versions of a run
rollout_log  every completion with its verdict, one Parquet file per step
"""
