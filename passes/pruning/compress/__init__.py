"""The pass `compress`: prune within a budget and make up for it, without training and without labels."""
