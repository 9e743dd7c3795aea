"""Tensor layouts: pure numpy functions from (codes, zero_point, scale) to the arrays of one file format.

Legend used by every module here: codes uint8 [N, K] in 0..2^bits-1, zero_point uint8 [N, G], scale fp16 [N, G];
N = out_features, K = in_features, G groups of K / G columns; W[n, k] = (codes - zero_point) * scale.
The inverses are in `qatcli.formats.readback`, written from the format descriptions and sharing no code with these
packers, so that an export is never checked with the code that made it. Both are proven against golden vectors.
"""
