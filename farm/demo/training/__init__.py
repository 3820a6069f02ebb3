"""Scripts that draw the demo pictures, train the demo model on them, and check it."""
