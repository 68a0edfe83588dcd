"""How fast an engine is, as figures that a fake engine, a simulator or an estimate of capacity can work with."""
