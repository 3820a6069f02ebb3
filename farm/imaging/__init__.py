"""Images as files: PNG, JPEG and WebP, their metadata, and filters."""
