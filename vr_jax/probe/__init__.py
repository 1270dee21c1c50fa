"""The probe of the paper's Fig. 1b: what a classifier reads from vision tokens, from the encoder to the last layer."""
