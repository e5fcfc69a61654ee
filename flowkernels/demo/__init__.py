"""What ``python -m flowkernels demo`` runs: one module per model or study, each with ``run(out_dir, quick=False)``."""
