"""Models: one protocol for every family, with exact attention and padding.

policy                  log-probabilities of tokens at chosen positions; the protocol that the rest sees
families                table of model families: class, names of weights, logit shift, attention, special tokens
loading                 opens checkpoints: published, our own, adapters, autoregressive models to be adapted
open                    opens the policy that a recipe describes, on its device, with its adapters
attention               positions and attention masks of batched sequences, whatever the padding
vocabulary              log-probabilities from hidden states, without logits of all rows at once
last_layer              evaluates the last layer only at the columns that are read
packing                 rows of several lengths in one line of tokens, without padding
gradient_checkpointing  recomputes layers in the backward pass
cuda_graphs             captures small passes as CUDA graphs (off by default)
"""
