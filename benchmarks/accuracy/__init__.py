"""The paper's comparison of systems, repeated with small models on generated images.

`python -m benchmarks.accuracy --help` shows the command; docs/results/accuracy.md holds the results.

A small encoder learns to read generated images (`tasks`) patch by patch (`encoder`) and is then frozen. From then on
only its cached hidden states are used. An uncompressed model learns to answer questions about the images (`reader`).
Each system of the paper's tables (`systems`) starts from the decoder of that model, and is trained for the same number
of steps on the same rows (`training`), from several seeds. Every finished run is one JSON line (`results`), and the
tables and the plot are made of these lines (`report`).
"""
