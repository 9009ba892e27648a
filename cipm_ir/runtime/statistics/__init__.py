"""Statistics of hidden units over calibration data: sums that shards can add up, in one pass."""
