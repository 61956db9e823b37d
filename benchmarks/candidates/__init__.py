"""Code that the library does not use yet: it is to be measured first."""
