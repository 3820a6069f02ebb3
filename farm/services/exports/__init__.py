"""Exports: images of jobs as datasets, in the formats that training code reads."""
