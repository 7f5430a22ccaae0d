"""Likelihood training, the stages before RL: samples, noise, loss.

samples    rows as token ids, in an order that can be resumed at any row
batch      samples that share a row, as tensors
noise      the forward process: masked positions and the divisors of their losses
objective  loss of one batch under its noise
"""
