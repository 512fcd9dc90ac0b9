"""What users copy: scripts to run as they are, and ``python -m examples.paper``."""
