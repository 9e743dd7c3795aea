"""What a model is worth, whatever its format.

measure      all figures of several models side by side; `compare` takes them from anywhere
opening      a path or hub id as a candidate (candidates: what that is)
perplexity   perplexity and divergence from full precision
zero_shot    accuracy through lm-eval (harness: its model on ours; rows: many questions per pass; local_tasks: its data)
speed, size  tokens per second, bytes
cache        figures of full-precision models, kept
options      what `qat eval MODEL...` asks for
tables       the figures for a terminal
"""
