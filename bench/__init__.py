"""What the fabric costs, measured against floors and baselines of the same run."""
