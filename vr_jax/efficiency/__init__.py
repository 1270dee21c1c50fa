"""Time to first token, decoding speed and device memory of several configs (paper, Table 5d and Fig. 4)."""
