"""The recipe: all settings of a run.

schema      the recipe of each stage, and the rules that connect sections
section     the base of the sections
model       model, adapter
data        data
rollout     rollout, and the sampler in it
objective   estimator, loss, optimizer
judging     reward, sandbox, evaluation
likelihood  fit
cluster     cluster, checkpoint
read        reading, overriding, validating and writing recipes
retired     fields of earlier releases
"""
