"""Who computes what, when, and what happens when they die: the coordinator of a run and its transports.

types        units of work, their keys and states, and the errors
ledger       what has become of every unit; the first result wins
admission    how far rollouts may run ahead of training
pool         workers, their incarnations and their states
coordinator  one single-threaded state machine over all of these; never blocks
transport    what the coordinator needs of processes: the protocol, and workers inside this process
processes    workers in processes of this machine
ray_actors   workers in Ray actors (imports nothing of Ray itself: `rl/cluster/ray.py` does)
simulate     workers in a virtual clock with scripted faults, for tests and models
runtime      pumps a coordinator in real time
rollouts     the rollout engine of a run, on all of these; `open` makes the one that a recipe asks for
top          what the events of a run add up to
"""
