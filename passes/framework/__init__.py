"""What every pass is built on: base class, options, registry, parser, pipeline and report."""
