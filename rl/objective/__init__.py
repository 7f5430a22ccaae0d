"""Objective: judged groups become a gradient. The fourth part of a step.

advantage  advantages relative to the group, and which groups carry information
batch      judged groups as one batch of tensors, and its micro-batches
loss       the clipped objective with a KL penalty
gradient   estimate, loss and backward pass of one micro-batch
"""
