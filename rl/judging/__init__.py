"""Judging: every completion's program is run against its tests. The second part of a step.

grader         scores completions with the recipe's reward functions
open           opens the grader and the sandbox that a recipe names
local_sandbox  sandbox of this host
ray_sandbox    sandbox in Ray actors, one host actor per node
"""
