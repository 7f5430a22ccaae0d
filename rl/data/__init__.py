"""Data: rows of files or of the hub become tasks, prompts and an order.

rows     rows of JSONL, Parquet, folders of either, and hub datasets
parquet  Parquet files
tasks    rows as tasks with tests
prompts  tasks as prompts of tokens
order    the rows of a step, as a function of the step alone
"""
