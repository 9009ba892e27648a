"""The pass `rotate`: orthogonal changes of basis that remove outliers."""
