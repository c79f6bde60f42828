"""What makes times and figures of kernels; no entry points live here."""
