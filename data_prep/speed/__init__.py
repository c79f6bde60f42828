"""What ``data_prep.bench`` measures, and the made-up data that it measures with."""
