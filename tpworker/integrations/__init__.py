"""tpworker on engines for several machines. Each file imports the engine that it is for, and no other."""
