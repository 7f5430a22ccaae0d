"""Trainer: optimizer steps on one rank or several, and checkpoints. The last part of a step.

open                opens the learner of a recipe, on one rank or several
learner             policy and optimizer of one rank, whatever the stage
rl_learner          adds scoring, rollouts and the RL update
likelihood_learner  adds the update of the stages before RL
optimizer           AdamW and the learning-rate schedule
checkpoint          the files of a checkpoint, and how they are read back
rank_group          several ranks behind the interface of one learner
rank_protocol       what a rank group and its ranks agree on: store keys, exits
rank_process        the process of every rank but the first
ray_ranks           ranks in Ray actors, on reserved places
collectives         a rank's share of the work, and its exchange with the others
sharding            weights split over the ranks
"""
