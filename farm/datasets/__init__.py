"""Datasets: a job's pictures with their texts, in the forms that training code already reads."""
