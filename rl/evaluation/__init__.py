"""Evaluation: how good a checkpoint is, how it decodes, and what training changed.

held_out        pass rates on held-out problems, before and after
benchmarks/     published task sets: adapters, programs, scores
statistics      pass@k, confidence intervals, paired tests
analyze         `coupled analyze`
decoding_order  measures of decoding order and confidence
plots           pictures of an analysis
causal          causal language models as a control
"""
