"""The fixes of this package as patches against `datasets`, and the check that keeps them so."""
