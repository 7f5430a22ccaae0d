"""Distribution of work over processes that may fail: the coordinator of a run and its transports.

types          units of work, their keys and states, and the errors
ledger         state of every unit; the first result wins
admission      how far rollouts may run ahead of training
pool           workers, their incarnations and their states
coordinator    one single-threaded state machine over all of these; never blocks
transport      protocols that reach processes and move weights
processes      workers in processes of this host
ray            the Ray instance of this process, or a cluster that it joins; the only file that imports ray
ray_transport  workers in Ray actors
placement      requested and available resources per host
simulate       workers on a virtual clock with scripted faults, for tests and models
runtime        pumps a coordinator in real time
"""
