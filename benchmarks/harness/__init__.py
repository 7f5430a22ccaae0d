"""Shared by all benchmarks:

report     results as JSON and Markdown, the environment they were made in, pictures
tables     Markdown tables; medians and means with their range
arms       arms that take turns; time, processor time and memory, the latter in a process of its own
models     random weights of published shapes, and the embedded model with the quickstart's prompts
seeds      runs of `coupled train`, continued where they stopped, and their curves
"""
