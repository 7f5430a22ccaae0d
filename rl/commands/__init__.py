"""Commands of the command line besides training.

sample       denoises one completion; `canvas_view` shows it filling in
export       writes a checkpoint as a model folder
dry_run      estimates memory and time of a run from the model's shape
doctor       checks this machine, with a remedy for each problem
sandbox      runs one program against its tests
supervise    resumes a run that was interrupted
top          shows workers, jobs and queues of a run; `run_view` reads its files
"""
