"""Per-example gradients from the real backward pass: the supported layers (`layers`), and how each is split."""
