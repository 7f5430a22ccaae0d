"""Models: one class for every family, with exact attention and padding.

policy                  log-probabilities of tokens at chosen positions; the class that the rest of the package uses
reference               the reference that the KL penalty pulls towards: none, adapters off, a frozen or a moving copy
weights                 weights of a policy: copied out, loaded, saved, split over ranks, identified by a digest
special_tokens          finds the mask token and the end tokens
families                table of model families: class, names of weights, logit shift, attention, special tokens
loading                 opens checkpoints: published, our own, adapters, autoregressive models to be adapted
open                    opens the policy that a recipe describes, on its device, with its adapters
attention               positions and attention masks of batched sequences, for any padding
vocabulary              log-probabilities from hidden states, without logits of all rows at once
last_layer              evaluates the last layer only at the columns that are read
packing                 rows of several lengths in one line of tokens, without padding
gradient_checkpointing  recomputes layers in the backward pass
"""
