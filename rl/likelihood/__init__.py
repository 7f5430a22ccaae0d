"""Likelihood training, the stages before RL: samples, noise, loss.

samples    rows as token ids, in an order that can be resumed anywhere
batch      which samples share a row, and the tensors they become
noise      the forward process: which positions are masked, and with which weight
objective  loss of one batch under its noise
"""
