"""What residual networks are said to do, measured: a module an experiment, with its settings, record and figure."""
