"""The supervisor of one machine: plain Python without Django, so that it starts fast and outlives the web."""
