"""Commands: what the command line does besides training.

sample       denoises one completion; `canvas_view` shows it filling in
export       a checkpoint as a model folder
dry_run      memory and time of a run, from the model's shape
doctor       what this machine can do, and the remedy for the rest
sandbox      one program against its tests
supervise    resumes a run that was interrupted
top          workers, units and waits of a run; `run_view` reads its files
"""
