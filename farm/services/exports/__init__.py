"""Exports: a job's images as datasets, in the forms that training code reads."""
