"""Images and videos as people have them, and pictures of what merged."""
