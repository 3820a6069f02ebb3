"""Files of prompts and options of `farm submit`, turned into a job."""
