"""Judging: every completion's program runs against its tests. The second part of a step.

grader         scores completions with the recipe's reward functions, and judges them by their tests
open           opens the grader and the sandbox that a recipe names
local_sandbox  sandbox of this host
ray_sandbox    sandbox in Ray actors, one host actor per node
"""
