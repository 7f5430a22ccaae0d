"""Trainer: optimizer steps on one rank or several, and checkpoints. The last part of a step.

open                opens the learner of a recipe, on one rank or several
learner             policy, reference and optimizer of one rank, for every stage
rl_learner          adds scoring, rollouts and the RL update
likelihood_learner  adds the update of the stages before RL
optimizer           AdamW and the learning-rate schedule
checkpoint          the files of a checkpoint, and how they are read back
rank_group          several ranks behind the interface of one learner
rank_protocol       agreements between a rank group and its ranks: store keys, handles, reports
rank_process        the process of every rank but the first, and its handle
rank_failures       finds the rank at fault, and distinguishes lost ranks from broken ones
ray_ranks           ranks in Ray actors, on reserved places
collectives         a rank's share of the work, and its exchange with the others
sharding            weights split over the ranks
"""
