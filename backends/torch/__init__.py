"""torch out: a changed program as the kind of torch object that came in."""
