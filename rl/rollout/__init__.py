"""Rollouts: completions by iterative denoising. The first part of a step.

sampler          requests, sampler settings, and the plan of steps that follows from them
engine           protocols of engines, the engine of one process, and the batches that all engines cut alike
schedule         prompts and requests of every training step
open             opens the engine that a recipe names
workers          engine on processes or Ray actors, up to `lag` steps ahead of the trainer
denoise          the denoising loop over the whole canvas
denoise_blocks   the same, block after block, with a key-value cache
canvas_states    hidden states of canvases, each distinct input computed once, or from a cache
readout          which positions are committed, and which tokens they get
row_statistics   entropy and best tokens of logit rows; `_torch` and `_triton` compute them
distributions    filters, draws and entropy of token distributions
parity           check before training: scoring reproduces the log-probabilities of rollouts
exactness        comparison of approximate rollouts with exact ones
"""
