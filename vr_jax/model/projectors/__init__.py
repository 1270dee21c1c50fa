"""Token-compressing projectors: window-major encoder features in, vision tokens of the decoder's width out."""
