"""What runs inside: plain Python of the standard library, imported by the template's own interpreter."""
