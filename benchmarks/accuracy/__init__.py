"""The paper's comparison in miniature: `python -m benchmarks.accuracy --help`; results in docs/results/accuracy.md.

A small encoder learns to read generated images (`tasks`) without compression (`reader`) and is frozen. From then on
only its cached hidden states are used: each system of the paper's tables (`systems`) starts from the uncompressed
model's decoder and is trained for the same steps on the same rows (`training`), several seeds each, one JSON line per
finished run (`results`), from which the tables and the plot are made (`report`)."""
