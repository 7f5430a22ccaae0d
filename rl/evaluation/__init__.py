"""Evaluation of checkpoints: scores, decoding order, and changes by training.

held_out        pass rates on held-out problems, before and after
benchmarks/     published task sets: adapters, programs, scores
statistics      pass@k, confidence intervals, paired tests
analyze         `coupled analyze`
decoding_order  measures of decoding order and confidence
plots           figures of an analysis
causal          causal language models as a control
"""
